#!/usr/bin/env bash
# Prepares data sets: TFDS data as array_record (which needs TensorFlow), or class folders.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/prepare_data.sh [options] NAME...

TFDS data as array_record, read with --config.data.name=NAME --config.data.dir=DATA_DIR:
  imagenet2012             from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar
  imagenet_a imagenet_r imagenet_v2 imagenet_sketch      downloaded
  imagenet2012_corrupted   15 corruptions x 5 severities, computed from ILSVRC2012_img_val.tar
  imagenet2012_corrupted/CORRUPTION_SEVERITY             one of them, such as .../fog_3

Class folders, read with --config.data.name=imagenet_folder --config.data.dir=DATA_DIR/imagenet
or DATA_DIR/imagenet-c:
  folders                  train/ and val/ from the same two tars, and the development kit's
                           ILSVRC2012_devkit_t12.tar.gz
  imagenet_c               downloaded; the images that published mCE are of

Options:
  --data_dir=DIR     where data sets are put (~/tensorflow_datasets)
  --manual_dir=DIR   where the tars from image-net.org lie (DATA_DIR/downloads/manual)
  --dry-run          print the commands, run nothing and ask for nothing
  --help             this text

TFDS data need: pip install tensorflow tensorflow-datasets array_record, and for
imagenet2012_corrupted opencv-python scikit-image scipy. Use an environment of its own: nothing
else here needs TensorFlow. TFDS data that are finished are not built again. Sizes: launch/README.md.
TEXT
}

fail() {
  echo "prepare_data.sh: $1" >&2
  exit 2
}

data_dir="${HOME:-/root}/tensorflow_datasets"
manual_dir=""
dry_run=false
names=()
for argument in "$@"; do
  case "$argument" in
    --data_dir=?*) data_dir="${argument#*=}" ;;
    --manual_dir=?*) manual_dir="${argument#*=}" ;;
    --dry-run) dry_run=true ;;
    --help|-h) usage; exit 0 ;;
    -*) fail "$argument: no such option; see --help" ;;
    *) names+=("$argument") ;;
  esac
done
manual_dir="${manual_dir:-$data_dir/downloads/manual}"
[[ ${#names[@]} -gt 0 ]] || fail "no data set is named; see --help"

CORRUPTIONS=(gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur
             snow frost fog brightness contrast elastic_transform pixelate jpeg_compression)
ZENODO=https://zenodo.org/records/2235448/files

run() {
  printf '%q ' "$@"
  printf '\n'
  "$dry_run" || "$@"
}

need_command() {
  "$dry_run" || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

need_tar() {
  "$dry_run" || [[ -f "$manual_dir/$1" ]] || fail "$manual_dir/$1 is not there: get it from \
https://image-net.org/download-images (free, with an account), or give --manual_dir"
}

build() {
  run tfds build "$1" --file_format=array_record --data_dir="$data_dir" \
    --manual_dir="$manual_dir"
}

# All that could be missing is looked for before the first hour of work.
check() {
  case "$1" in
    imagenet2012)
      need_tar ILSVRC2012_img_train.tar
      need_tar ILSVRC2012_img_val.tar ;;
    imagenet2012_corrupted|imagenet2012_corrupted/*_[1-5]) need_tar ILSVRC2012_img_val.tar ;;
    imagenet_a|imagenet_r|imagenet_v2|imagenet_v2/*|imagenet_sketch) ;;
    folders)
      need_tar ILSVRC2012_img_train.tar
      need_tar ILSVRC2012_img_val.tar
      need_tar ILSVRC2012_devkit_t12.tar.gz
      return ;;
    imagenet_c)
      need_command wget "apt-get install wget"
      return ;;
    *) fail "$1: no data set of that name; see --help" ;;
  esac
  need_command tfds "pip install tensorflow tensorflow-datasets array_record"
}

class_folders() {
  local to="$data_dir/imagenet" inner
  run mkdir -p "$to/train" "$to/val"
  run tar -xf "$manual_dir/ILSVRC2012_img_val.tar" -C "$to/val"
  run tar -xf "$manual_dir/ILSVRC2012_devkit_t12.tar.gz" -C "$to"
  run tar -xf "$manual_dir/ILSVRC2012_img_train.tar" -C "$to/train"
  if "$dry_run"; then
    echo "# then, for each of the 1000 WNID.tar in $to/train:"
    echo "mkdir WNID && tar -xf WNID.tar -C WNID && rm WNID.tar"
    return
  fi
  for inner in "$to"/train/n*.tar; do
    mkdir -p "${inner%.tar}"
    tar -xf "$inner" -C "${inner%.tar}"
    rm "$inner"
  done
}

imagenet_c() {
  local part
  run mkdir -p "$data_dir/imagenet-c"
  for part in noise blur weather digital; do
    run wget --continue -P "$data_dir/imagenet-c" "$ZENODO/$part.tar"
    run tar -xf "$data_dir/imagenet-c/$part.tar" -C "$data_dir/imagenet-c"
    run rm "$data_dir/imagenet-c/$part.tar"
  done
}

for name in "${names[@]}"; do
  check "$name"
done
for name in "${names[@]}"; do
  case "$name" in
    folders) class_folders ;;
    imagenet_c) imagenet_c ;;
    imagenet_v2) build imagenet_v2/matched-frequency ;;
    imagenet2012_corrupted)
      for corruption in "${CORRUPTIONS[@]}"; do
        for severity in 1 2 3 4 5; do
          build "imagenet2012_corrupted/${corruption}_$severity"
        done
      done ;;
    *) build "$name" ;;
  esac
done
