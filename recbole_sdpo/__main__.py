"""``python -m recbole_sdpo`` is the command."""

from recbole_sdpo.command import main

main()
