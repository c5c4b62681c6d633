"""Records to tokens: interleaving, chat templates, what is learnt."""
