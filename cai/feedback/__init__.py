"""What a model's judgement of its own texts is made into: revisions found in what it wrote, votes, and labels."""
