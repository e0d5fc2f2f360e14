"""What a plan says, as text and as JSON."""

import dataclasses
from collections.abc import Sequence

from advprop_jax.experiment import training_attack
from advprop_jax.runtime import hlo
from advprop_jax.runtime.config import create_scheme
from advprop_jax.runtime.metrics import table
from launch import step_program
from launch.fitting import Attempt, describe
from launch.slices import GIB

DAY = 24 * 60 * 60                     # seconds


@dataclasses.dataclass(frozen=True)
class Estimate:
  """How long training would take.

  Attributes:
    steps: updates of the whole training.
    flops_per_image: of convolutions and matrix products, for each image of the data.
    seconds_per_step: at the utilisation that is assumed, if the chips' arithmetic is what limits.
    days: of all steps; evaluation, and a data pipeline that is slower, are not in it.
  """

  steps: int
  flops_per_image: float
  seconds_per_step: float
  days: float


def estimate(attempt: Attempt, utilisation: float) -> Estimate:
  """From FLOPs, the peak of the slice's chips and an assumed utilisation, 0-1."""
  recipe, flops = attempt.recipe, attempt.compiled.flops
  seconds = flops / (recipe.slice.generation.peak_flops * utilisation)
  return Estimate(
      steps=recipe.total_steps,
      flops_per_image=flops * recipe.slice.chips / recipe.config.data.batch_size,
      seconds_per_step=seconds, days=seconds * recipe.total_steps / DAY)


def text(attempts: Sequence[Attempt], utilisation: float) -> str:
  """The plan as a plain-text table; the last attempt is the plan's."""
  last = attempts[-1]
  recipe, compiled, config = last.recipe, last.compiled, last.recipe.config
  generation = recipe.slice.generation
  rows = [
      ["network", f"{config.model.name}, {config.data.image_size} px, {config.model.dtype}, "
                  f"{recipe.num_classes} classes"],
      ["scheme", f"{config.scheme}: {create_scheme(config)}"],
      ["attack", str(training_attack(config, 1))],
      ["slice", f"{recipe.slice.name}: {recipe.slice.chips} chips, each with "
                f"{generation.hbm_bytes / GIB:.0f} GiB of HBM and a peak of "
                f"{generation.peak_flops / 1e12:.0f} TFLOP/s"],
      ["batch", f"{config.data.batch_size} images: {describe(recipe)}"],
      *[["does not fit", f"{attempt}: {_needs(attempt)}"] for attempt in attempts
        if not attempt.compiled.fits]]
  if compiled.fits:
    rows += _of_the_program(last, utilisation)
  rows.append(["compiled", f"in {compiled.compile_seconds:,.0f} s "
                           f"({compiled.compile_cpu_seconds:,.0f} s of a core), traced in "
                           f"{compiled.lower_seconds:,.0f} s, by "
                           + ", ".join(" ".join(pair) for pair in step_program.versions().items())
                           + ("; kept from then" if last.was_kept else "")])
  return table(rows, ["plan", ""])


def _of_the_program(last: Attempt, utilisation: float) -> list[list[str]]:
  """Rows of a step that fits."""
  compiled, time = last.compiled, estimate(last, utilisation)
  loops = "" if not compiled.unknown_loops else "; a loop does not say how often it runs"
  return [
      ["fits", f"yes, {_needs(last)}"],
      ["bytes per chip", ", ".join(f"{name} {size / GIB:.2f} GiB"
                                   for name, size in compiled.bytes.items())],
      ["FLOPs", f"{compiled.flops:.3e} per step and chip, {time.flops_per_image:.3e} per image, of "
                f"convolutions and matrix products, each loop as often as it runs{loops}"],
      ["", f"{compiled.flops_once:.3e} with the body of each loop once, where XLA counts "
           f"{compiled.xla_flops:.3e} with all else"],
      *[["collectives", line] for line in collective_lines(compiled.collectives)],
      ["time", f"{time.days:.3g} days: {time.steps:,} steps of {time.seconds_per_step:.3g} s, if "
               f"{utilisation:.0%} of the peak is reached (an assumption, not measured)"]]


def collective_lines(collectives: Sequence[dict]) -> list[str]:
  """One line for each kind, place and group of collectives."""
  together = {}
  for found in collectives:
    key = (found["kind"], found["depth"], found["times"], found["group"])
    together.setdefault(key, []).append(found["bytes"])
  lines = []
  for (kind, depth, times, group), sizes in sorted(together.items(), key=str):
    where = "outside of loops" if not depth else (
        f"inside of {depth} loop{'s' if depth > 1 else ''}, "
        + ("as often as they run" if times is None else f"{times} times"))
    among = "among all chips" if group is None else f"in groups of {group}"
    lines.append(f"{len(sizes)} {kind} {among}, {where}: {sum(sizes) / 1e6:.3f} MB"
                 f"{' each time' if depth else ''}")
  return lines or ["none"]


def as_json(attempts: Sequence[Attempt], utilisation: float) -> dict:
  """The plan for programs: the last attempt, and what was tried before it."""
  last = attempts[-1]
  recipe, config = last.recipe, last.recipe.config
  result = {
      "network": config.model.name, "image_size": config.data.image_size,
      "scheme": config.scheme, "attack_steps": config.attack.num_steps,
      "topology": recipe.slice.name, "chips": recipe.slice.chips,
      "hbm_bytes": recipe.slice.generation.hbm_bytes,
      "peak_flops": recipe.slice.generation.peak_flops,
      **_settings(last), "tried": [
          {**_settings(attempt), "needed_bytes": attempt.compiled.needed_bytes,
           "available_bytes": attempt.compiled.available_bytes} for attempt in attempts[:-1]],
      "versions": step_program.versions(), "kept": last.was_kept,
      **dataclasses.asdict(last.compiled)}
  if last.compiled.fits:
    result["collective_totals"] = hlo.totals(
        hlo.Collective(**found) for found in last.compiled.collectives)
    result["assumed_utilisation"] = utilisation
    result |= dataclasses.asdict(estimate(last, utilisation))
  return result


def _settings(attempt: Attempt) -> dict:
  config = attempt.recipe.config
  return {"batch_size": config.data.batch_size, "at_once": attempt.recipe.at_once,
          "accumulation": config.train.accumulation, "remat": config.model.remat,
          "bn_group_size": config.model.bn_group_size}


def _needs(attempt: Attempt) -> str:
  compiled = attempt.compiled
  most = compiled.available_bytes or attempt.recipe.slice.generation.hbm_bytes
  return f"it needs {compiled.needed_bytes / GIB:.2f} of {most / GIB:.2f} GiB"
