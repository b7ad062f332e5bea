"""Reinforcement learning from rewards: where rewards come from, how the policy is sampled, what learns from it.

Read in this order: `reward_functions` and `rewards` (what a response is worth), `policy_sampler` (the policy as an
engine), `rollouts` (responses and everything recorded about them), `actor_critic` (the model), `ppo_config` and
`ppo_trainer` (the method), `early_stopping` (when to stop); `rloo_trainer` is TRL's, on the same rewards and sampler.
"""
