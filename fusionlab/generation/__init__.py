"""Generation: prompts, the sampler on a cache, what may follow, how it is drawn."""
