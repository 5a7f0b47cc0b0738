"""``python -m recbole_sdpo`` is the command."""

from recbole_sdpo.command import main
from recbole_sdpo.experiment.worker import end_with_parent

end_with_parent()
main()
