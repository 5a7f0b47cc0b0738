"""From RecBole's dataset to text: titles, prompts, candidate sets, training targets. Knows no
language model."""
