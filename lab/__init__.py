"""Beyond the paper: attacks, rules, partitions, privacy, experiments, and their figures."""
