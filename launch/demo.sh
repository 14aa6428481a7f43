#!/usr/bin/env bash
# The whole pipeline with small models, on two CPU cores: corpus, teachers, soft labels, sweep, selection, prediction.
# Each stage is the very command that a cluster runs, and skips what is complete. Run the same command again after a
# stop of any kind; the stages go on from their last saved state.
#
#   launch/demo.sh [RUN]               the bundled sample corpus; everything is written below RUN (runs/demo)
#   RECCON=DIR launch/demo.sh [RUN]    RECCON's files (kdecs corpus fetch DIR downloads them)
set -euo pipefail
root=$(realpath "$(dirname "$0")/..") reccon=${RECCON:+$(realpath -m "$RECCON")}
run=$(realpath -m "${1:-$root/runs/demo}") stopped='' pids=()
cd "$root"; command -v kdecs >/dev/null || PATH=$root/.venv/bin:$PATH
# Models this small are trained on two CPU ranks everywhere, whatever GPUs there are.
export KDECS_DEVICE=cpu DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
fail() { echo "kdecs: error: $2" >&2; exit "$1"; }
stop() { stopped=1; ((${#pids[@]} == 0)) || kill -TERM "${pids[@]}" 2>/dev/null || true; }
check() { [[ -z $stopped ]] || fail 143 "demo stopped; run the same command again to resume"; }
start() { # NAME COMMAND...: a stage beside this script; its output is kept in RUN/logs, SHOW=--all shows all of it
  check; local log=$run/logs/$1.log; shift
  python -m kdecs.launch.stage ${SHOW:-} "$log" "$@" 9>&- & pids+=($!)
}
finish() { # wait for the stages that were started; each prints its own error
  local pid code worst=0
  for pid in "${pids[@]}"; do
    code=0; wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done # a signal interrupts `wait`
    ((code == 0)) || worst=$code
  done
  pids=(); check; ((worst == 0)) || exit "$worst"
}
stage() { start "$@"; finish; }
share() { [[ -z $reccon ]] || echo --set "$1=$2"; } # of RECCON's training dialogues, so that it ends in minutes
corpus() { [[ -n $reccon ]] && echo "$reccon/dailydialog_$1.json" || echo "kdecs/corpus/sample/$1.json"; }
train=$(corpus train) valid=$(corpus valid) test=$(corpus test)
for file in "$train" "$valid" "$test"; do
  [[ -f $file ]] || fail 1 "$file: no such file; RECCON= names the directory that kdecs corpus fetch DIR has filled"
done

trap stop INT TERM; mkdir -p "$run/logs"
exec 9>"$run/.lock" 8>"$run/.stages.lock" # the first is held by this script alone, the second by its stages, too
flock -n 9 || fail 1 "$run: another demo runs here; wait for it, or choose another RUN=dir"
flock -n 8 || { echo "waiting for the stages of a killed demo to save their state …"; flock 8; }
tracked=(--set "tracking.uri=sqlite:///$run/mlflow.db" --set tracking.experiment=kdecs-demo)
labelled=(--set "corpus.train=$train" --set "corpus.valid=$valid")
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
launcher() { [[ -f $1/manifest.json ]] && echo python -m || echo "${@:2}"; } # a complete stage needs no ranks
echo; echo "1/6 corpus"
SHOW=--all stage corpus-verify kdecs corpus verify "$train" "$valid" "$test"
SHOW=--all stage corpus-stats kdecs corpus stats "$train" "$valid" "$test"
echo; echo "2/6 teachers: tiny bases, then LoRA under DeepSpeed ZeRO on two ranks"
for model in llama roberta; do
  start "base-$model" python -m kdecs.launch.pretrain_base --config "demo/base_$model" \
    --set "output=$run/base/$model" "${labelled[@]}" $(share corpus.train_share 0.3)
done; finish
for model in llama roberta; do
  start "teacher-$model-tiny" $(launcher "$run/teachers/$model-tiny" \
    deepspeed --num_accelerators 2 --master_port "$(free_port)" --module) kdecs.launch.train_teacher \
    --config "demo/teacher_$model" --set "output=$run/teachers/$model-tiny" --set "model.base=$run/base/$model" \
    "${labelled[@]}" "${tracked[@]}" $(share corpus.train_share 0.2)
done; finish
echo; echo "3/6 soft labels: sharded export on two ranks"
for model in llama roberta; do # exports share nothing but their directory; torchrun starts sooner than deepspeed
  start "soft-labels-$model-tiny" $(launcher "$run/labels/$model-tiny" torchrun --standalone --nproc_per_node 2 -m) \
    kdecs.launch.export_soft_labels --config demo/export \
    --set "output=$run/labels/$model-tiny" --set "teacher=$run/teachers/$model-tiny" \
    "${labelled[@]}" "${tracked[@]}" --set "corpus.test=$test" $(share corpus.train_share 0.1)
done; finish
echo; echo "4/6 sweep: students over seeds, α, τ and teacher, two at a time"
stage sweep python -m kdecs.launch.sweep demo --set "output=$run/sweep" "${tracked[@]}" \
  --set "teachers.llama-tiny=$run/labels/llama-tiny" --set "teachers.roberta-tiny=$run/labels/roberta-tiny" \
  --set "student.model.base=$run/base/roberta" --set "student.cache=$run/cache" \
  --set "student.corpus.train=$train" --set "student.corpus.valid=$valid" --set "student.corpus.test=$test" \
  $(share student.corpus.train_share 0.1)
echo; echo "5/6 selection on validation, test once, report"
SHOW=--all stage selection python -m kdecs.launch.select_student --sweep "$run/sweep"
stage report kdecs report "$run/sweep"
echo; echo "6/6 prediction on unlabelled dialogues"
winner=$(python -c 'import json, sys; print(json.load(sys.stdin)["winner"]["directory"])' <"$run/sweep/selection.json")
SHOW=--all stage predict kdecs predict --student "$run/sweep/$winner" \
  --input kdecs/corpus/sample/unlabelled.json --output "$run/predictions.jsonl"
printf '\ndone in %s s\nreport:     %s\n' "$SECONDS" "$run/sweep/report/index.html"
echo "MLflow UI:  make ui RUN=${run#"$root/"}"
