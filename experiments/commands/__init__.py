"""What the verbs of the command line do; `experiments.verbs` has their options."""
