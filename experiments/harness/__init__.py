"""Models on the tasks of EleutherAI's lm-evaluation-harness, which `seqarch lm-eval` scores."""
