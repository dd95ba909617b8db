"""Commands on what each layer costs in accuracy, and on budgets."""
