from pathlib import Path
SHIPPED = Path(__file__).parent / "policies"
