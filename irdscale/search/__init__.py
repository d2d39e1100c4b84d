"""The search: a pure algorithm, the journal of its evaluations, and the runner that does them."""
