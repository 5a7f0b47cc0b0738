"""The command line: the program ``recbole-sdpo``, with a file for each of its sub-commands."""
