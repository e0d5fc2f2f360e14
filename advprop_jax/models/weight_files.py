"""Files of published weights: safetensors, torch's pickles, and the Hugging Face hub's.

Whatever `config.model.pretrained` names is found here and read as {tensor name: array}, together
with the JSON that describes it where there is one.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import safetensors
import safetensors.numpy

from advprop_jax.errors import InputError
from advprop_jax.models.torch_file import read_torch_file, state_dict_of

SAFETENSORS = "model.safetensors"
HUB_FILES = (SAFETENSORS, "pytorch_model.bin")   # the first that a repository has
DESCRIPTION = "config.json"                      # as timm writes it to the hub
_INSIDE = "advprop_jax"                          # where that is in a file's own metadata
TORCH_ENDINGS = (".pth", ".pt", ".bin", ".tar", ".ckpt")

# "owner/name", perhaps with the prefix that timm gives it and a revision; "./name" is a path.
HUB_ID = re.compile(
    r"(?:hf[-_]hub:)?(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
  """Where weights lie.

  Attributes:
    tensors: the file of tensors.
    name: of the file, or the id on the hub: it may tell what the weights are.
    description: the content of the JSON beside it or inside, {} where there is none.
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
  try:
    path = pathlib.Path(source).expanduser()
    is_folder, is_there = path.is_dir(), path.exists()
  except (OSError, RuntimeError) as error:   # a name too long, a folder closed to us, no such ~user
    raise InputError(f"config.model.pretrained={source!r}: cannot be looked for "
                     f"({getattr(error, 'strerror', None) or error}); give another path") from error
  if is_folder:
    present = [path / name for name in HUB_FILES if (path / name).exists()]
    if not present:
      raise InputError(f"config.model.pretrained={source!r}: the folder holds neither a run or an "
                       f"export of this program nor {' or '.join(HUB_FILES)}; give a file, or "
                       "another folder")
    return WeightFiles(present[0], present[0].name, _description(present[0]))
  if is_there:
    return WeightFiles(path, path.name, _description(path))
  found = HUB_ID.fullmatch(source)
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
  path = pathlib.Path(path)
  try:
    return _read(path)
  except InputError as error:
    reason = str(error).removeprefix(f"{path}: ")
    raise InputError(f"config.model.pretrained={str(path)!r}: {reason}") from error


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with open(path, "rb") as file:
      start = file.read(9)
  except OSError as error:
    raise InputError(f"cannot be read ({error.strerror}); give a file that can") from error
  # Eight bytes of the header's length, and the header is JSON.
  if start[8:] != b"{":
    try:
      return read_torch_file(path)
    except InputError as error:
      if path.suffix != ".safetensors":
        raise
      reason = str(error).removeprefix(f"{path}: ")
      raise InputError(f"it is no safetensors file, and {reason}") from error
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError, TypeError, ValueError, KeyError,
          AttributeError) as error:
    raise InputError(f"it is no whole safetensors file ({_first_line(error)}); copy or download "
                     "it again") from error
  return state_dict_of(tensors)


def _description(tensors: pathlib.Path) -> dict[str, Any]:
  """The JSON beside a file of weights; without one, that which `write_tensors` has put inside."""
  path, content = tensors.with_name(DESCRIPTION), "{}"
  try:
    content = path.read_text(encoding="utf-8")
  except OSError:
    with (contextlib.suppress(safetensors.SafetensorError, OSError),   # another kind of file
          safetensors.safe_open(tensors, framework="numpy") as file):
      content = (file.metadata() or {}).get(_INSIDE, "{}")
  except ValueError as error:
    raise _no_json(path, error) from error
  try:
    content = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise _no_json(path, error) from error
  return content if isinstance(content, dict) else {}


def _no_json(path: pathlib.Path, error: Exception) -> InputError:
  return InputError(f"config.model.pretrained: {str(path)!r} beside the weights is no JSON "
                    f"({error}); mend or remove it")


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray],
                  description: dict[str, Any]) -> None:
  """Writes a safetensors file with its DESCRIPTION inside as well.

  So the file that is copied away alone still says how its images were normalised.
  """
  safetensors.numpy.save_file(dict(tensors), path, metadata={
      "format": "pt", _INSIDE: json.dumps(description)})


def _from_hub(source: str, repository: str, revision: str | None) -> WeightFiles:
  from huggingface_hub import constants, errors  # here, for those alone who need the hub

  asked, endpoint = f"config.model.pretrained={source!r}", constants.ENDPOINT

  def fetch(name):
    try:
      return _fetch(repository, name, revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
            errors.HFValidationError) as error:
      raise InputError(f"{asked}: there is no such path, and the hub {endpoint} has no such "
                       f"repository or revision for you ({_first_line(error)}); look at its "
                       "spelling, or log in with `hf auth login`") from error
    except Exception as error:   # of the network, in whatever form the hub's library meets it
      raise InputError(
          f"{asked}: {name} of {repository} is not in the hub's cache "
          f"({constants.HF_HUB_CACHE}), and {endpoint} was tried and did not give it "
          f"({_first_line(error)}); a local path works too: fetch the file where there is a "
          "network, and give its path") from error

  found = next(filter(None, map(fetch, HUB_FILES)), None)
  if found is None:
    raise InputError(f"{asked}: the repository holds neither {' nor '.join(HUB_FILES)}; give "
                     "another")
  fetch(DESCRIPTION)   # to lie beside it
  return WeightFiles(found, repository, _description(found))


def _fetch(repository: str, name: str, revision: str | None) -> pathlib.Path | None:
  """The path of a file, now in the hub's cache; None where the repository has no such file."""
  import huggingface_hub as hub
  from huggingface_hub import errors

  file = {"repo_id": repository, "filename": name, "revision": revision}
  try:
    # Where nobody answers, the download alone would go on asking for half a minute.
    with contextlib.suppress(errors.HfHubHTTPError):
      hub.get_hf_file_metadata(hub.hf_hub_url(**file))
    return pathlib.Path(hub.hf_hub_download(**file))
  except errors.RemoteEntryNotFoundError:
    return None
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
    raise
  except Exception:
    cached = hub.try_to_load_from_cache(**file)
    if cached is None:   # else it is a path, or the mark of a file that the repository has not
      raise
    return pathlib.Path(cached) if isinstance(cached, str) else None


def _first_line(error: BaseException) -> str:
  """What the first of a chain of errors says."""
  chain = [error]
  while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
    chain.append(cause)
  lines = str(chain[-1]).strip().splitlines()
  return lines[0][:200] if lines else type(chain[-1]).__name__
