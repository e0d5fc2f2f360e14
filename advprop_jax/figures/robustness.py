"""Robustness: accuracy by corruption, and by the strength of the attack."""

import dataclasses
from collections.abc import Mapping, Sequence

from advprop_jax.figures.page import Section, evaluate_command, listed
from advprop_jax.figures.runs import Estimate, Group, accuracy, average
from advprop_jax.figures.style import INK, Panel, draw, look
from advprop_jax.method.attack import Attack

# As the paper of ImageNet-C groups them.
KINDS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
SEVERITIES = ("1", "2", "3", "4", "5")
# Of results -> what its images are.
SETS = {"corruptions": "test images, corrupted in memory",
        "imagenet_c": "ImageNet-C, the files as released"}
STRENGTH = "strength"


@dataclasses.dataclass(frozen=True)
class Corrupted:
  """Accuracy of one group on corrupted images, fractions.

  Attributes:
    severities: {corruption: {severity: top-1, the mean over runs}}.
    means: {corruption: top-1, the mean over its severities and over runs}, those with all five.
    mean: over all of them, as it was measured.
    runs: how many.
    images: of each setting.
  """

  severities: dict[str, dict[str, float]]
  means: dict[str, Estimate]
  mean: Estimate
  runs: int
  images: int


def corrupted(group: Group, kind: str) -> Corrupted | None:
  """Of the runs of a group that have it, of as many images as the first; None if none has it."""
  details = [run.details[kind] for run in group.runs if run.details.get(kind)]
  details = [each for each in details if each["images"] == details[0]["images"]]
  if not details:
    return None
  errors = [each["errors"] for each in details]
  names = [name for names in KINDS.values() for name in names
           if all(name in each for each in errors)]
  severities = {name: {severity: average([1 - each[name][severity] for each in errors])[0]
                       for severity in SEVERITIES if all(severity in each[name] for each in errors)}
                for name in names}
  means = {name: average([1 - average(list(each[name].values()))[0] for each in errors])
           for name in names if len(severities[name]) == len(SEVERITIES)}
  if len(details) == 1:
    mean = 1 - details[0]["mean_error"], details[0].get("standard_error")
  else:
    mean = average([1 - each["mean_error"] for each in details])
  return Corrupted(severities, means, mean, len(details), min(each["images"] for each in details))


@dataclasses.dataclass(frozen=True)
class Strength:
  """Accuracy of one group by epsilon.

  Attributes:
    epsilons: rising, 0-255 units.
    estimates: top-1 at each of them, fractions.
    runs: how many.
    images: of each epsilon.
    attack: a dictionary of Attack, but for the epsilon.
    restarts: attacks of each image, of which the strongest counts.
  """

  epsilons: list[float]
  estimates: list[Estimate]
  runs: int
  images: int
  attack: dict
  restarts: int = 1


def strength(group: Group) -> Strength | None:
  """At the epsilons that all runs of the group have that were attacked as the first of them."""
  details = [run.details[STRENGTH] for run in group.runs if run.details.get(STRENGTH)]
  details = [each for each in details if _alike(each) == _alike(details[0])]
  if not details:
    return None
  points = [{point["epsilon"]: point for point in each["points"]} for each in details]
  epsilons = sorted(set.intersection(*map(set, points)))
  estimates = [accuracy(points[0][epsilon]) if len(points) == 1 else
               average([each[epsilon]["top1"] for each in points]) for epsilon in epsilons]
  images = min(point["images"] for each in points for point in each.values())
  return Strength(epsilons, estimates, len(points), images, details[0].get("attack") or {},
                  details[0].get("restarts", 1))


def _alike(detail: Mapping) -> tuple:
  """What has to be the same of two measurements that are averaged."""
  return (detail.get("attack"), detail.get("restarts", 1),
          {point["images"] for point in detail["points"]})


def sections(groups: Sequence[Group], network: str = "") -> list[Section]:
  """Each kind of corruptions, then attack strength; of the network named, if there are several."""
  of, made = network and f" of {network}", []
  for kind, images in SETS.items():
    found = {group: data for group in groups if (data := corrupted(group, kind))}
    if found:
      made.append(_corruption_section(f"Robustness{of}: {images}", kind, network, found, groups))
  if not made:
    made.append(Section(f"Robustness{of} to corruptions", reason=(
        "no run has an accuracy on corrupted images; "
        + evaluate_command(groups[0].first, "clean,adversarial,corruptions"))))
  return [*made, _strength_section(groups, network)]


def _corruption_section(title, kind, network, found: Mapping[Group, Corrupted], groups) -> Section:
  panels = [_bars(f"{kind}_{part}{network and f'_{network}'}", part, names, found)
            for part, names in {**KINDS, "mean": ()}.items()
            if not names or any(name in data.means for name in names for data in found.values())]
  caption = (
      "Bars: top-1 accuracy, mean over the five severities. Dots: each severity, from 1 (smallest "
      "dot) to 5 (largest). All panels have one scale. Measured through the main batch norms on "
      f"{_images(found, ' of each setting')}.")
  seeded = [group.name for group, data in found.items() if data.runs > 1]
  if seeded:
    caption += f" Of {listed(seeded)}: mean over seeds, error bars one standard error over seeds."
  if len(seeded) < len(found):
    caption += (" Of a single run there is an error bar on the mean alone, one standard error over "
                "the images.")
  caption += _fewer(found)
  lacking = [group.name for group in groups if group not in found]
  if lacking:
    caption += f" {listed(lacking)}: not measured."
  return Section(title, [caption], panels)


def _bars(name: str, kind: str, corruptions: Sequence[str], found: Mapping[Group, Corrupted]
          ) -> Panel:
  rows = corruptions or ("mean of all",)
  width = 0.8 / len(found)

  def plot(axes):
    for number, (group, data) in enumerate(found.items()):
      style = look(group)
      for row, corruption in enumerate(rows):
        mean, error = data.means.get(corruption, (None, None)) if corruptions else data.mean
        if mean is None:
          continue
        y, third = row - 0.4 + (number + 0.5) * width, 0.22 * width
        axes.barh(y, 100 * mean, 0.9 * width, color="white" if style.hatch else style.colour,
                  edgecolor=style.colour, hatch=style.hatch, linewidth=0.8, alpha=0.75,
                  label=group.name if row == 0 else None)
        if error is not None:
          axes.errorbar(100 * mean, y - third, xerr=100 * error, color=INK, capsize=2.5,
                        linewidth=1.2)
        if not corruptions:
          axes.text(min(100 * (mean + (error or 0)) + 2, 88), y, f"{100 * mean:.1f}", va="center")
        levels = data.severities.get(corruption, {})
        for severity, top1 in levels.items():
          axes.plot(100 * top1, y + third, "o", color="white", markeredgecolor=INK,
                    markersize=1.8 + 0.8 * int(severity), markeredgewidth=0.9)
    axes.set(xlabel="top-1 (%)", xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
    axes.grid(False, axis="y")

  values = [f"{group.name} {row.replace('_', ' ')} {100 * mean[0]:.1f} %"
            for group, data in found.items() for row in rows
            if (mean := data.means.get(row) if corruptions else data.mean)]
  title = f"Corruptions: {kind}" if corruptions else "Mean over all corruptions"
  height = 0.85 + len(rows) * (0.14 + 0.27 * len(found))
  return draw(name, title, f"{title}, bars of top-1: {'; '.join(values)}.", plot,
              height=height, legend=[group.name for group in found], left=1.35)


def _strength_section(groups: Sequence[Group], network: str) -> Section:
  title = f"Accuracy{network and f' of {network}'} by the strength of the attack"
  found = {group: data for group in groups if (data := strength(group))}
  if not found:
    return Section(title, reason=(
        "no run was attacked with several epsilons; "
        + evaluate_command(groups[0].first, "clean,adversarial,strength")))

  def plot(axes):
    for group, data in found.items():
      style = look(group)
      means, errors = zip(*data.estimates, strict=True)
      axes.errorbar(data.epsilons, [100 * mean for mean in means],
                    yerr=[100 * (error or 0) for error in errors], color=style.colour,
                    marker=style.marker, linestyle=style.dash, capsize=2.5,
                    label=group.name)
    axes.set(xlabel="epsilon (of 255)", ylabel="top-1 (%)", ylim=(0, 100))
    axes.set_xlim(left=0)

  values = [f"{group.name} {100 * mean:.1f} % at {epsilon:g}" for group, data in found.items()
            for epsilon, (mean, _) in zip(data.epsilons, data.estimates, strict=True)]
  attacks = [attack_words(data.attack) + (f", {data.restarts} starts" if data.restarts > 1 else "")
             for data in found.values()]
  caption = (
      "Top-1 on adversarial images by the radius of the attack's ball, in steps of a pixel of 0 to "
      "255. Each network is attacked, and classifies, through its own main batch norms. The "
      f"attack: {listed(list(dict.fromkeys(attacks)))}, whose step grows with "
      f"epsilon, on {_images(found)}. ")
  caption += _error_words([data.runs for data in found.values()])
  if len(set(attacks)) > 1:
    caption += " The runs were not attacked alike, so their lines do not compare."
  caption += _fewer(found)
  panel = draw(f"attack_strength{network and f'_{network}'}", "Attack strength",
               f"Top-1 by epsilon: {'; '.join(values)}.", plot,
               legend=[group.name for group in found])
  return Section(title, [caption], [panel])


def _images(found: Mapping[Group, Corrupted | Strength], what: str = "") -> str:
  """How many images were seen, once if it is the same number everywhere."""
  numbers = {group.name: f"{data.images:,} images{what}" for group, data in found.items()}
  if len(set(numbers.values())) == 1:
    return next(iter(numbers.values()))
  return listed([f"{images} ({label})" for label, images in numbers.items()])


def _fewer(found: Mapping[Group, Corrupted | Strength]) -> str:
  """Says where not all runs of a group were measured, or not alike."""
  fewer = [f"{data.runs} of the {len(group.runs)} runs of {group.name}"
           for group, data in found.items() if data.runs < len(group.runs)]
  return f" There are {listed(fewer)} with such a measurement." if fewer else ""


def _error_words(runs: Sequence[int]) -> str:
  words = []
  if max(runs) > 1:
    words.append(f"one standard error over seeds ({max(runs)} at most)")
  if min(runs) == 1:
    words.append("one standard error over the images where there is one run")
  return f"Error bars: {' and '.join(words)}."


def attack_words(attack: Mapping) -> str:
  """An attack in a few words, also of a dictionary that knows more or fewer fields than ours."""
  if not attack:
    return "not recorded"
  known = {field.name for field in dataclasses.fields(Attack)}
  return str(Attack(**{name: value for name, value in attack.items() if name in known}))
