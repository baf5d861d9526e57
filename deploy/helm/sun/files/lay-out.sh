#!/bin/sh
# Lays out a root for `sun serve --root $ROOT`: the image's code and base by links, its models copied, set as the ConfigMap says.
# A root of its own, and not the image's: that one is read-only.
#
# IMAGE: the image's root. SETTINGS: config.pbtxt of the models. WORKERS: decode workers. TASKS: the image's tasks to serve, all if
# empty. ADDED: further ones, name=folder of $WEIGHTS. Names have no spaces, the chart's schema sees to that.
set -eu
rm -rf "$ROOT/model_repository" "$ROOT/backends" "$ROOT/build"
mkdir -p "$ROOT/build"
cp -R "$IMAGE/model_repository" "$ROOT/model_repository"
ln -s "$IMAGE/backends" "$ROOT/backends"
ln -s "$IMAGE/build/base" "$ROOT/build/base"
cd "$ROOT/model_repository"

for task in $TASKS; do
  [ -d "prefill_$task" ] || { echo "tasks.names: the image has no task $task" >&2; exit 1; }
done
for prefill in prefill_*; do
  task=${prefill#prefill_}
  case " $TASKS " in
    "  " | *" $task "*) ;;
    *) rm -rf "$prefill" "$task" ;;
  esac
done
for added in $ADDED; do
  sun task add "${added%%=*}" --weights "$WEIGHTS/${added#*=}" --root "$ROOT"
done
for prefill in prefill_*; do
  # Where a parameter that comes again takes the first one's place, a second instance group is one more.
  ! grep -q '^instance_group' "$SETTINGS/prefill.pbtxt" || sed -i '/^instance_group/d' "$prefill/config.pbtxt"
  cat "$SETTINGS/prefill.pbtxt" >> "$prefill/config.pbtxt"
done

rm -rf decode_*
worker=0
while [ "$worker" -lt "$WORKERS" ]; do
  mkdir -p "decode_$worker/1"
  sed "s/WORKER/$worker/" "$SETTINGS/decode.pbtxt" > "decode_$worker/config.pbtxt"
  worker=$((worker + 1))
done
cp "$SETTINGS/sun.pbtxt" sun/config.pbtxt
