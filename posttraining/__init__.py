"""From a trained model to a useful one.

Read instruct (a base model learns to answer) and chat; then adapters, the layers behind lora.py, with
merging, adapter_costs and adapter_command; nf4 (a model in 4 bits); and classify, which has its own loop,
beside naive_bayes, which counts words.

Then what people prefer: frontier (how good a policy can be), dpo with reference and online_dpo, and reward;
chain_preferences and preference_runs hold common parts. Last, learning from a reward:
policy_gradient (the equations), rollout, and ppo, the loop of them all, with prompts and scores around it.
"""
