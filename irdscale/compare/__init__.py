"""Methods against each other: the same learning rates, as many trainings, several seeds, chosen before the test."""
