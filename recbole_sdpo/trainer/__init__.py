"""Training in two stages, on top of RecBole's trainer."""

from recbole_sdpo.trainer.sdpo_trainer import SDPOTrainer

__all__ = ["SDPOTrainer"]
