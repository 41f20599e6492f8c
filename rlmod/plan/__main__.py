from rlmod.plan import main

main()
