"""The paper: what a mini-batch becomes, the attack, the loss and the step."""
