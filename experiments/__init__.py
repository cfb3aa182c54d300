"""Programs that use the library; `experiments.run` is the command line."""
