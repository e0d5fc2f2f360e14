"""Every benchmark of the paper, of published weights or of a run.

  python -m advprop_jax.main --config=configs/robustness.py:b0 --mode=evaluate --workdir=DIR \
      --config.data.dir=IMAGENET --config.eval.dir=FOLDER_OF_THE_OTHER_SETS
  python -m advprop_jax.main --config=configs/robustness.py:lite0,in_memory --mode=evaluate \
      --workdir=DIR --config.data.dir=IMAGENET --config.model.pretrained=FILE.pth

IMAGENET holds val/, as class folders or flat; FOLDER holds imagenet-c/, imagenet-a/, imagenet-r/,
imagenetv2-matched-frequency-format-val/, sketch/, stylized-imagenet/, whatever of them there is:
the others are skipped, with the reason. launch/README.md says how to get them. `in_memory` needs
val/ alone: 50 images are corrupted in 75 ways and painted, all are attacked.

Hardware: one GPU, or a laptop for a few hundred images. Published: top-1 77.6 of B0 to 85.5 of B8
(tensorflow/tpu); ImageNet-A, -R, -Sketch as timm measured them stand in the table. Here: not run on
ImageNet; on 20 photographs, see README.md.
"""

from advprop_jax.runtime.config import default_config
from advprop_jax.runtime.variants import choose
from configs.finetune import WEIGHTS

CHOICES = {"weights": tuple(WEIGHTS), "benchmarks": ("released", "in_memory")}
BENCHMARKS = {
    "released": "clean,imagenet_c,imagenet_a,imagenet_r,imagenet_v2,imagenet_sketch,"
                "stylized_imagenet",
    "in_memory": "clean,adversarial,strength,corruptions,stylized",
}


def get_config(variant: str = ""):
  """`variant`: weights and benchmarks, such as "b3,in_memory"."""
  chosen = choose(variant, CHOICES)
  config = default_config()
  config.model.name, config.model.pretrained = WEIGHTS[chosen["weights"]]
  config.data.name, config.data.test_split = "imagenet_folder", "val"
  config.attack.epsilon = config.attack.step_size = 1.0   # the paper's, for small networks
  config.attack.num_steps = 1
  config.eval.benchmarks = BENCHMARKS[chosen["benchmarks"]]
  if chosen["benchmarks"] == "in_memory":
    config.eval.corrupted_images = 50
    config.eval.num_steps, config.eval.step_size = 10, 0.25
  return config
