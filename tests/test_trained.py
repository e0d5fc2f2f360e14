"""Networks from runs, exports and published files, and what a training makes of them."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image

from advprop_jax import models, trained
from advprop_jax.data import imagenet
from advprop_jax.errors import InputError
from advprop_jax.evaluate import evaluate
from advprop_jax.experiment import create_experiment, initial_state, resolve
from advprop_jax.method.step import to_model_units
from advprop_jax.models.weights import from_state_dict, to_timm
from advprop_jax.train import train
from tests.small_run import make_config, random_variables


def flat(tree):
  return {"/".join(path): np.asarray(leaf)
          for path, leaf in traverse_util.flatten_dict(tree).items()}


def test_a_plain_network_becomes_one_of_advprop(published):
  """Fails where an auxiliary batch norm starts afresh, or averages or main ones do not start as the
  weights."""
  path, source = published(), flat(random_variables())
  config = make_config({"model.pretrained": path, "model.input_convention": "inception"})
  state, origin = initial_state(create_experiment(config))
  assert origin.keeps_classifier
  for tree in (state.variables, state.ema):
    ours = flat(tree)
    assert set(source) < set(ours)
    for name, value in ours.items():
      main = name.replace("_adversarial", "")
      np.testing.assert_array_equal(value, source[main], err_msg=name)
  assert sum("_adversarial" in name for name in flat(state.variables)) == 4 * 5  # 5 batch norms
  buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.variables, state.ema))]
  assert len(set(buffers)) == len(buffers)  # or the state could not be donated


def test_other_classes_start_with_a_fresh_classifier(published, tmp_path, capsys):
  """Fails where weights of other classes are kept or the log does not say that they are not."""
  config = make_config({"model.pretrained": published(7), "train.steps": 1,
                        "model.input_convention": "imagenet", "train.ema_decay": 0.0})
  state, origin = initial_state(create_experiment(config))
  assert not origin.keeps_classifier
  assert not np.any(state.params["classifier"]["kernel"])
  np.testing.assert_array_equal(state.params["stem"]["kernel"],
                                random_variables(7)["params"]["stem"]["kernel"])
  with pytest.raises(InputError, match=r"the network has 7.*train it first"):
    evaluate(config, str(tmp_path / "none"))
  train(config, str(tmp_path / "run"))
  assert "its classifier, of 7 other classes, is left out" in capsys.readouterr().out
  assert trained.read_run(str(tmp_path / "run")).input_convention == "imagenet"


def test_classes_of_other_names_are_other_classes(published):
  """Fails where only the number of classes is compared."""
  names = [f"thing {i}" for i in range(10)]
  config = make_config({"model.pretrained": published(description={"label_names": names}),
                        "model.input_convention": "inception"})
  assert not initial_state(create_experiment(config))[1].keeps_classifier
  names = list(create_experiment(make_config()).train_source.class_names)
  config.model.pretrained = published(description={"label_names": names})
  assert initial_state(create_experiment(config))[1].keeps_classifier


def test_the_convention_comes_with_the_weights(published, tmp_path):
  """Fails where a wrong convention is taken without a word."""
  config = make_config({"model.pretrained": published()})
  with pytest.raises(InputError, match=r"model.input_convention.*'weights.safetensors'.*inception"):
    resolve(config)
  for mean, std, name in (([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "imagenet"),
                          ([0.5] * 3, [0.5] * 3, "inception")):
    config.model.pretrained = published(description={"pretrained_cfg": {"mean": mean, "std": std}})
    assert resolve(config).model.input_convention == name
  config.model.input_convention = "lite"
  assert resolve(config).model.input_convention == "lite"
  assert resolve(make_config()).model.input_convention == "inception"


def test_a_run_keeps_its_convention_when_the_weights_are_gone(published, tmp_path):
  path = published(description={"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]})
  config, workdir = make_config({"model.pretrained": path, "train.steps": 1}), str(tmp_path / "run")
  train(config, workdir)
  os.remove(path)
  os.remove(os.path.join(os.path.dirname(path), "config.json"))
  assert resolve(config, workdir).model.input_convention == "imagenet"
  results = evaluate(config, workdir)["results"]
  assert results["clean"]["images"] == 12
  with pytest.raises(InputError, match="there is no such file"):
    resolve(config)


def test_published_weights_can_be_evaluated(published, tmp_path):
  """The numbers are those of the network as published, computed here by hand."""
  config = make_config({"model.pretrained": published(), "model.input_convention": "lite",
                        "data.test_split": "test[:50]", "eval.batch_size": 50})
  summary = evaluate(config, str(tmp_path / "new"))
  source = create_experiment(config).test_source
  images = np.stack([record["image"] for record in source])
  model = models.create_model("one_block", 10, input_convention="lite")
  logits = model.apply(random_variables(), to_model_units(jnp.asarray(images)))
  right = np.asarray(jnp.argmax(logits, 1)) == [record["label"] for record in source]
  assert summary["results"]["clean"]["top1"] == pytest.approx(np.mean(right))
  assert summary["weights"] == config.model.pretrained


def test_what_a_run_has_trained(run):
  """Fails where averages and weights are mixed up, or the convention, the classes or a domain is
  lost."""
  config, workdir = run
  averages, weights = trained.read_run(workdir), trained.read_run(workdir, kind=trained.TRAINED)
  state, _ = initial_state(create_experiment(config))
  assert jax.tree.structure(averages.variables) == jax.tree.structure(state.variables)
  assert not np.allclose(averages.variables["params"]["stem"]["kernel"],
                         weights.variables["params"]["stem"]["kernel"])
  assert averages.class_names == create_experiment(config).train_source.class_names
  assert (averages.step, averages.image_size, averages.crop_fraction) == (2, 28, 1.0)
  assert averages.source == "step 2, moving averages"
  assert not [name for name in flat(averages.deployed) if "adversarial" in name]


def test_a_run_starts_where_another_has_ended(run):
  """Its auxiliary batch norms go on too."""
  _, workdir = run
  state, origin = initial_state(create_experiment(make_config({"model.pretrained": workdir})))
  assert origin.keeps_classifier
  jax.tree.map(np.testing.assert_array_equal, state.variables, trained.read_run(workdir).variables)
  main, auxiliary = (state.variables[name]["stem_norm"]["mean"]
                     for name in ("batch_stats", "batch_stats_adversarial"))
  assert np.any(main != auxiliary)


def test_there_and_back_through_an_exported_checkpoint(run, tmp_path):
  _, workdir = run
  network, folder = trained.read_run(workdir), str(tmp_path / "exported")
  trained.write_exported(network, folder)
  back = trained.read(folder, "one_block")
  jax.tree.map(np.testing.assert_array_equal, back.variables, network.deployed)
  assert (back.class_names, back.step, back.source, back.convention, back.image_size) == (
      network.class_names, network.step, network.source, network.convention, network.image_size)
  state, _ = initial_state(create_experiment(make_config({"model.pretrained": folder})))
  np.testing.assert_array_equal(state.params["stem_norm"]["scale_adversarial"],
                                network.variables["params"]["stem_norm"]["scale"])


def test_weights_of_another_network_are_named(run, published, tmp_path):
  _, workdir = run
  with pytest.raises(InputError, match=r"of one_block, not of resnet_tiny.*config.model.name"):
    trained.read(workdir, "resnet_tiny")
  for other in ("tf_efficientnet_b0", "one_block"):  # without tf_: timm's other padding
    path = published(description={"architecture": other})
    with pytest.raises(InputError, match=f"those of {other}, not of tf_one_block"):
      trained.read(path, "one_block")
  tensors = to_timm("resnet_tiny", jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, np.float32),
      jax.eval_shape(models.create_model("resnet_tiny").init, jax.random.key(0),
                     jnp.zeros((1, 32, 32, 3)))))
  safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
  with pytest.raises(InputError, match=r"pretrained='.*other.safetensors'.*look like.*resnet_tiny"):
    trained.read(str(tmp_path / "other.safetensors"), "one_block")


@pytest.mark.parametrize("description", [
    {"input_size": 224}, {"mean": 0.5, "std": 0.5}, {"crop_pct": "a"}, {"crop_pct": 5},
    {"mean": ["a"] * 3, "std": [1] * 3}, {"label_names": 5}])
def test_a_description_of_another_form(description, published):
  with pytest.raises(InputError, match=r"config.model.pretrained='.*config.json.*mend or remove"):
    trained.read(published(description=description), "one_block")


def test_a_description_without_contents(published):
  network = trained.read(published(description={"pretrained_cfg": None}), "one_block")
  assert network.num_classes == 10


def test_what_is_no_network(tmp_path):
  (tmp_path / "empty").mkdir()
  for source, says in ((str(tmp_path / "empty"), "holds neither"),
                       ("nothing.pth", "there is no such file"),
                       ("dir/nothing.safetensors", "there is no such file")):
    with pytest.raises(InputError, match=f"config.model.pretrained='.*{says}"):
      trained.read(source, "one_block")


def test_classes_of_imagenet():
  assert len(imagenet.WNIDS) == len(set(imagenet.WNIDS)) == 1000
  assert list(imagenet.WNIDS) == sorted(imagenet.WNIDS)
  assert (imagenet.words("n01440764"), imagenet.words("shoe")) == ("tench", "shoe")


def test_only_norms_and_classifier_are_trained(published, tmp_path):
  """Fails where a frozen weight moves or decays, or a batch norm of any domain does not move."""
  config = make_config({
      "model.pretrained": published(), "model.input_convention": "inception",
      "optimizer.trainable": "norms_and_classifier", "optimizer.weight_decay": 0.1,
      "optimizer.learning_rate": 0.1, "train.ema_decay": 0.0})
  train(config, str(tmp_path / "run"))
  before = flat(initial_state(create_experiment(config))[0].params)
  after = flat(trained.read_run(str(tmp_path / "run")).variables["params"])
  moved = {name for name, value in after.items() if np.any(value != before[name])}
  # The next batch norm takes the bias of a projection away, so that its gradient is nearly 0.
  assert moved == {name for name in after if (
      "_norm/" in name or name.startswith("classifier/")) and "project_norm/bias" not in name}


def test_weights_from_state_dict_are_float32():
  half = {name: value.astype(np.float16)
          for name, value in to_timm("one_block", random_variables()).items()}
  assert {leaf.dtype for leaf in jax.tree.leaves(from_state_dict("one_block", half))} == {
      np.dtype("float32")}


def test_a_run_can_be_evaluated_where_its_training_images_are_not(run, tmp_path):
  """On other images of the same classes; fails where all data of the run have to be there."""
  config, workdir = run
  config = config.copy_and_resolve_references()
  source = create_experiment(config).test_source
  for i, record in enumerate(source):
    folder = tmp_path / "val" / source.class_names[record["label"]].replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(record["image"]).save(folder / f"{i}.png")
  config.data.name, config.data.dir, config.data.test_split = "folder", str(tmp_path), "val"
  with pytest.raises(InputError, match="its classes are not those of the run"):
    evaluate(config, workdir)
  kept = trained.read_classes(workdir)
  names = sorted(path.name for path in (tmp_path / "val").iterdir())
  trained.write_classes(workdir, tuple(names))
  try:
    summary = evaluate(config, workdir)
  finally:
    trained.write_classes(workdir, kept)
  assert summary["results"]["clean"]["images"] == 12
  assert summary["data"] == "folder, val"


def test_what_is_recorded_is_what_was_measured(run, tmp_path):
  """Fails where other weights than the averages are called so, or a run that is given as pretrained
  has the scheme, the seed or the batch norms of the config it is measured with."""
  config, workdir = run
  config = config.copy_and_resolve_references()
  averages = evaluate(config, workdir)
  config.export.weights = "trained"
  raw = evaluate(config, workdir)
  assert (averages["weights"], raw["weights"]) == ("moving averages", "as trained")
  assert averages["results"]["clean"]["loss"] != raw["results"]["clean"]["loss"]

  given = make_config({"scheme": "vanilla", "seed": 7, "model.pretrained": workdir})
  other = evaluate(given, str(tmp_path / "other"))
  assert (other["scheme"], other["seed"], other["step"]) == ("advprop", config.seed, 2)
  assert other["weights"] == workdir
  assert other["results"] == averages["results"]


def test_an_export_and_a_run_of_one_domain_can_be_evaluated(run, tmp_path):
  """Fails where the config's batch norms are asked of a network that has none of them."""
  config, workdir = run
  trained.write_exported(trained.read_run(workdir), str(tmp_path / "exported"))
  vanilla = make_config({"scheme": "vanilla", "train.steps": 1})
  train(vanilla, str(tmp_path / "vanilla"))
  expected = {"exported": trained.read_run(workdir).step, "vanilla": 1}
  for name, step in expected.items():
    given = make_config({"model.pretrained": str(tmp_path / name)})
    assert given.scheme == "advprop"
    summary = evaluate(given, str(tmp_path / "out" / name))
    assert set(summary["results"]) == {"clean", "adversarial, main BN"}
    assert "no auxiliary" in summary["skipped"]["auxiliary"]
    assert summary["step"] == step
  clean = evaluate(config, workdir)["results"]["clean"]
  assert evaluate(make_config({"model.pretrained": str(tmp_path / "exported")}),
                  str(tmp_path / "again"))["results"]["clean"] == clean
