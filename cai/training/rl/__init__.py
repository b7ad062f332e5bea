"""Reinforcement learning from rewards: where rewards come from, how the policy is sampled, what learns from it.

Read in this order: `functions` and `rewards` (what a response is worth), `prompts` (what is responded to), `sampler`
(the policy as an engine), `rollouts` (responses and all that is known of them), `actor_critic` (the model),
`ppo_config` and `ppo_trainer` (the method), `watch` (when to stop); `rloo_trainer` is TRL's, on the same rewards and
sampler.
"""
