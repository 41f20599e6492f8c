"""What a person sees of a run, and what is kept of it. Callbacks only watch: none changes what is trained."""
