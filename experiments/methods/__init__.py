"""Methods that prune during training, as CrAM's papers compare them.

Most are a few lines on the parts of `cram_jax`: a rule that renews masks (`masks`), a
gradient at the projection (`estimators`), a pull towards it (`multipliers`), parameters
that learn what to keep (`learned`). Those that need more code have a file of their own:
`dynamic` (RigL, SET), `platon`, `frank_wolfe`, `lottery`. `build` makes them from a
configuration.
"""
