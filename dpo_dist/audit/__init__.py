"""`dpo-dist audit`: what is wrong with the preference data, before a model learns from it."""
