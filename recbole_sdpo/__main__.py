"""``python -m recbole_sdpo`` is the command."""

import sys

from recbole_sdpo.command.program import main
from recbole_sdpo.experiment.worker import end_with_parent

end_with_parent()
sys.exit(main())
