"""Files of published weights: safetensors, torch's pickles, and the Hugging Face hub's.

Whatever `config.model.pretrained` names is found here and read as {tensor name: array}, together
with the JSON that describes it where there is one.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import safetensors

from advprop_jax.errors import InputError
from advprop_jax.models.torch_file import read_torch_file, state_dict_of

SAFETENSORS = "model.safetensors"
HUB_FILES = (SAFETENSORS, "pytorch_model.bin")   # the first that a repository has
DESCRIPTION = "config.json"                      # as timm writes it to the hub
TORCH_ENDINGS = (".pth", ".pt", ".bin", ".tar", ".ckpt")

# "owner/name", perhaps with the prefix that timm gives it and a revision.
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
  """Where weights lie.

  Attributes:
    tensors: the file of tensors.
    name: of the file, or the id on the hub: it may tell what the weights are.
    description: the content of the JSON beside it, {} where there is none.
  """

  tensors: pathlib.Path
  name: str
  description: dict[str, Any]


def find(source: str) -> WeightFiles:
  """Finds weights: a local file, a local folder of the hub's form, or an id on the hub.

  Args:
    source: "DIR/model.safetensors", "DIR/weights.pth", "DIR", or "owner/name[@revision]", which is
      fetched through huggingface_hub into its cache, unless it is there.

  Raises:
    InputError: there is no such file, or the hub cannot be reached.
  """
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    present = [path / name for name in HUB_FILES if (path / name).exists()]
    if not present:
      raise InputError(f"config.model.pretrained={source!r}: the folder holds neither a run or an "
                       f"export of this program nor {' or '.join(HUB_FILES)}; give a file, or "
                       "another folder")
    return WeightFiles(present[0], present[0].name, _description(path / DESCRIPTION))
  if path.exists():
    return WeightFiles(path, path.name, _description(path.with_name(DESCRIPTION)))
  found = _HUB_ID.fullmatch(source)
  if not found or path.suffix in (".safetensors", *TORCH_ENDINGS):
    raise InputError(f"config.model.pretrained={source!r}: there is no such file, and it is no id "
                     "on the Hugging Face hub, such as 'timm/tf_efficientnet_b0.ap_in1k'; give one "
                     "of both")
  return _from_hub(source, found["repository"], found["revision"])


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors of a file, {name: array}.

  Args:
    path: a safetensors file, or one that torch.save wrote, of which nothing is executed. What it is
      is seen in its content.

  Raises:
    InputError: it is neither, or not whole.
  """
  try:
    with open(path, "rb") as file:
      start = file.read(9)
  except OSError as error:
    raise InputError(f"config.model.pretrained={str(path)!r}: cannot be read ({error.strerror}); "
                     "give a file that can") from error
  # Eight bytes of the header's length, and the header is JSON.
  if start[8:] != b"{" and pathlib.Path(path).suffix != ".safetensors":
    return read_torch_file(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError, TypeError, ValueError, KeyError,
          AttributeError) as error:
    raise InputError(f"config.model.pretrained={str(path)!r}: is no whole safetensors file "
                     f"({str(error).strip() or type(error).__name__}); copy or download it "
                     "again") from error
  return state_dict_of(tensors)


def _description(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except OSError:
    return {}
  except ValueError as error:
    raise InputError(f"config.model.pretrained: {str(path)!r} beside the weights is no JSON "
                     f"({error}); mend or remove it") from error
  return content if isinstance(content, dict) else {}


def _from_hub(source: str, repository: str, revision: str | None) -> WeightFiles:
  import huggingface_hub as hub  # half a second, for those alone who need it
  from huggingface_hub import errors

  def fetch(name):
    try:
      return pathlib.Path(hub.hf_hub_download(repository, name, revision=revision))
    except errors.LocalEntryNotFoundError:   # also an EntryNotFoundError, but of the cache
      raise
    except errors.EntryNotFoundError:
      return None

  asked = f"config.model.pretrained={source!r}"
  try:
    found = next(filter(None, map(fetch, HUB_FILES)), None)
    description = fetch(DESCRIPTION) if found else None
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
          errors.HFValidationError) as error:
    raise InputError(f"{asked}: the hub {hub.constants.ENDPOINT} has no such repository or "
                     f"revision for you ({_first_line(error)}); look at its spelling, or log in "
                     "with `hf auth login`") from error
  except Exception as error:   # of the network, in whatever form the hub's library meets it
    raise InputError(
        f"{asked}: {HUB_FILES[0]} of {repository} is not in the hub's cache "
        f"({hub.constants.HF_HUB_CACHE}), and {hub.constants.ENDPOINT} was tried and did not give "
        f"it ({_first_line(error)}); a local path works too: fetch the file where there is a "
        "network, and give its path") from error
  if found is None:
    raise InputError(f"{asked}: the repository holds none of {', '.join(HUB_FILES)}; give another")
  return WeightFiles(found, repository, _description(description) if description else {})


def _first_line(error: Exception) -> str:
  cause = error
  while cause.__cause__ or cause.__context__:
    cause = cause.__cause__ or cause.__context__
  lines = [str(each).strip().splitlines()[:1] for each in (error, cause)]
  return next((line[0][:200] for line in reversed(lines) if line), type(error).__name__)
