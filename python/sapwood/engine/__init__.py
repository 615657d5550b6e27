"""From a prompt to its output: tokenizer, scheduler, plan, step loop, output rules, detokenizer, the public engines."""
