"""From text to log-probabilities. Knows nothing of recommenders."""
