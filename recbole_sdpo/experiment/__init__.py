"""Many runs from one YAML file: their plan, the runs, and a search of their settings."""
