"""Accuracy on adversarial images: through the main and the auxiliary batch norms, and transferred.

Attacks are white-box, of the true label, with the settings of `config.eval`; of
`config.eval.restarts` attacks of an image the strongest counts.
"""

import dataclasses

from advprop_jax.benchmarks.contract import Benchmark, Measured, Subject, Unavailable, test_pass
from advprop_jax.method.attack import APGD, Attack, create_attack

MAIN, AUXILIARY = "adversarial, main BN", "adversarial, auxiliary BN"


def main_norms(subject: Subject) -> Benchmark:
  """The network that is deployed, attacked."""
  return Benchmark({MAIN: _attacked(subject, subject.attack)})


def auxiliary_norms(subject: Subject) -> Benchmark:
  """The network with its auxiliary batch norms, attacked through these."""
  if subject.auxiliary is None:
    raise Unavailable("the network has no auxiliary batch norms for adversarial images")
  return Benchmark({AUXILIARY: _attacked(subject, subject.attack, domain=subject.auxiliary)})


def transferred(subject: Subject) -> Benchmark:
  """Adversarial images made against another network, shown to this one."""
  if subject.surrogate is None:
    raise Unavailable("config.eval.transfer_from names no other network")
  # Without restarts: which of them is the strongest, only the measured network could say.
  name = f"adversarial, transferred from {subject.surrogate.name}"
  return Benchmark({name: test_pass(subject, attack=subject.attack, surrogate=subject.surrogate)})


def strength(subject: Subject) -> Benchmark:
  """Accuracy by epsilon, `config.eval.strengths`; the step size grows in proportion."""
  if not subject.attack.ball:
    raise Unavailable(f"attacker {subject.attack.name!r} has no epsilon")
  attacks = {f"adversarial, epsilon {epsilon:g}": scaled(subject.attack, epsilon)
             for epsilon in epsilons(subject.config.eval.strengths)}

  def details(measured: Measured, rows):
    del rows
    points = [{"epsilon": attacks[name].epsilon, **row} for name, row in measured.rows.items()]
    return {"attack": dataclasses.asdict(subject.attack),
            "restarts": subject.config.eval.restarts, "points": points}

  return Benchmark({name: _attacked(subject, attack) for name, attack in attacks.items()}, details)


def auto_pgd(subject: Subject) -> Benchmark:
  """APGD-CE, which has no step size that could be set wrong, through the main batch norms."""
  if not subject.attack.ball:
    raise Unavailable(f"attacker {subject.attack.name!r} has no epsilon")
  attack = dataclasses.replace(subject.attack, name=APGD, num_steps=subject.config.eval.apgd_steps)
  return Benchmark({"adversarial, APGD-CE": _attacked(subject, attack)})


def epsilons(text: str) -> tuple[float, ...]:
  """The numbers of "0.5, 1, 2"; a ValueError where one is no number, negative or named twice."""
  values = tuple(float(word) for word in text.split(","))
  different = {f"{value:g}" for value in values}       # as rows are named
  if min(values) < 0 or max(values) == float("inf") or len(different) < len(values):
    raise ValueError(text)
  return values


def scaled(attack: Attack, epsilon: float) -> Attack:
  """The attack with another epsilon, and a step in proportion to it."""
  share = attack.step_size / attack.epsilon if attack.epsilon else 1 / max(attack.num_steps, 1)
  settings = {**dataclasses.asdict(attack), "epsilon": epsilon, "step_size": share * epsilon}
  return create_attack(**settings)


def _attacked(subject, attack, domain=None):
  return test_pass(subject, attack=attack, domain=domain or subject.main,
                   restarts=subject.config.eval.restarts)
