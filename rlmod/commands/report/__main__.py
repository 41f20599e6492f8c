from rlmod.commands.report import main

main()
