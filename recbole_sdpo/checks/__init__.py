"""What must hold of settings, so that a run that cannot end does not begin."""
