"""Records to tokens: interleaving, chat templates, target masks."""
