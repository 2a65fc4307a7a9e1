"""Ways to use a patch from programs that know nothing of vlmfix: evaluators, servers, checkpoints for other engines."""
