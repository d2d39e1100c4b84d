"""The search: the IRD algorithm, the ledger of its evaluations, and the engines that run them."""
