"""The test images of any data set, changed in memory: ImageNet-C's corruptions, painted styles."""

from advprop_jax.benchmarks import imagenet_c, mce
from advprop_jax.benchmarks.contract import Benchmark, Pass, Subject
from advprop_jax.benchmarks.corruptions import corrupted
from advprop_jax.benchmarks.stylized import stylized
from advprop_jax.data.transforms import evaluation_transform

CORRUPTED, STYLIZED = "corruptions", "stylized"
NOTE = ("made in memory by imagecorruptions-imaug: not comparable to the released ImageNet-C, so "
        "without an mCE")


def corruptions(subject: Subject) -> Benchmark:
  """Mean accuracy over 15 corruptions x 5 severities, not divided by another network's."""
  images = number(subject)
  names = [imagenet_c.set_name(*setting) for setting in mce.SETTINGS]
  one = Pass(source=corrupted(subject.open_test(), subject.transform, limit=images),
             sets=dict.fromkeys(names, images), same_images=True, **_as_made(subject))

  def details(measured, rows):
    del rows
    errors = imagenet_c.errors_of(measured.sets[CORRUPTED])
    return {**imagenet_c.summary(errors, measured.rows[CORRUPTED]), "missing": [], "mce": None,
            "relative_mce": None, "note": NOTE if subject.knows_imagenet else ""}

  return Benchmark({CORRUPTED: one}, details)


def styles(subject: Subject) -> Benchmark:
  """Accuracy on the images as paintings; not the paper's Stylized-ImageNet (stylized.py)."""
  source = stylized(subject.open_test(), subject.transform, limit=number(subject))
  return Benchmark({STYLIZED: Pass(source=source, sets={STYLIZED: len(source)},
                                   **_as_made(subject))})


def number(subject: Subject) -> int:
  """How many test images are changed."""
  images, most = len(subject.open_test()), subject.config.eval.corrupted_images
  return images if most is None else min(most, images)


def _as_made(subject):
  """The images have their size already; to make them costs more than to look at them."""
  return {"transform": evaluation_transform(subject.config.data.image_size),
          "domain": subject.main, "slow_images": True}
