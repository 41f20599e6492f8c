from rlmod.commands.plan import main

main()
