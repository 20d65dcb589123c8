#!/usr/bin/env bash
# Renews the numbers in benchmarks/results that are older than the code they measure; all of them with --force.
#
#     bash benchmarks/all.sh          # on an otherwise idle machine; about half an hour on 2 cores
#
# Each file begins with the commit that was measured, the machine and the command. docs/benchmarks.md quotes them. The
# accuracy tables are made by benchmarks/accuracy.py, which repeats nothing that is finished: they take days.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmarks/results
mkdir -p "$results"

# measure NAME "PATHS that it depends on" COMMAND...
measure() {
    local name=$1 paths=$2 file="$results/$1.txt" measured
    shift 2
    measured=$(sed -n 's/^commit: \([0-9a-f]*\).*/\1/p' "$file" 2>/dev/null || true)
    # shellcheck disable=SC2086  # PATHS is a list
    if [[ -z $force && -n $measured ]] && git diff --quiet "$measured" -- $paths 2>/dev/null; then
        echo "$name: measured at $measured, and nothing that it measures has changed since"
        return
    fi
    echo "$name: $*"
    {
        echo "commit: $(git rev-parse --short HEAD)$(git diff --quiet HEAD -- d2kd d2lite benchmarks || echo ', and changes')"
        echo "machine: $(python -c 'from d2kd.evaluation.report import describe_environment as e; print(e())')"
        echo "command: $*"
        "$@"
    } >"$file.new" 2>"$results/error.log"
    mv "$file.new" "$file"
    rm "$results/error.log"
}

force=${1:-}
models="d2lite/modeling d2lite/layers d2lite/structures"
step="benchmarks/step_cost.py d2kd/modeling d2kd/distillers d2kd/layers $models"
small="FeatureMimic MaskedGenerative ReceptiveTokens ChannelMatching LogitKD HeadRegression"
some="FeatureMimic ReceptiveTokens ChannelMatching"
large="FeatureMimic ReceptiveTokens ChannelMatching LogitKD HeadRegression"
fast="DISTILL.TEACHER.FOLD_NORMS True DISTILL.TEACHER.CHANNELS_LAST True"
half="DISTILL.TEACHER.PRECISION bfloat16"
compiled="DISTILL.TEACHER.COMPILE default"
clock=--processor-time # of one thread: what else runs on the machine counts less
export OMP_NUM_THREADS=1
# shellcheck disable=SC2086
{
    cost="python benchmarks/step_cost.py $clock"
    measure step_cost_quickstart "$step" $cost --pair quickstart --repeats 25 --methods $small
    measure step_cost_r50_r18 "$step" $cost --pair r50-r18 --methods ChannelMatching
    measure step_cost_r101_r50 "$step" $cost --pair r101-r50 --size 384 --repeats 3 --methods $large
    measure step_cost_x101_r50 "$step" $cost --pair x101-r50 --size 256 --repeats 3 --methods FeatureMimic ChannelMatching
    measure step_cost_fast "$step" $cost --pair r101-r50 --size 384 --repeats 3 --methods $some --opts $fast
    measure step_cost_fast_bfloat16 "$step" $cost --pair r101-r50 --size 384 --repeats 3 --methods FeatureMimic --opts $fast $half
    measure step_cost_compiled "$step" $cost --pair r101-r50 --size 384 --repeats 3 --methods FeatureMimic --opts $fast $compiled
}
unset OMP_NUM_THREADS
tokens="benchmarks/receptive_tokens.py d2kd/distillers/receptive_tokens d2kd/layers"
measure imitation "benchmarks/imitation.py d2kd/layers" python benchmarks/imitation.py
measure receptive_tokens "$tokens" python benchmarks/receptive_tokens.py
matching="benchmarks/channel_matching.py d2kd/distillers/channel_matching d2kd/layers"
measure channel_matching "$matching" python benchmarks/channel_matching.py
measure frozen_norm "benchmarks/frozen_norm.py $models" python benchmarks/frozen_norm.py
measure models "benchmarks/models.py d2kd/modeling/backbone d2kd/modeling/sem_seg $models" python benchmarks/models.py
measure faster_teacher "benchmarks/faster_teacher.py d2kd/modeling/teacher_passes $models" python benchmarks/faster_teacher.py
measure growth "benchmarks/growth.py d2kd/distillers d2kd/layers" python benchmarks/growth.py
measure cache "benchmarks/cache.py d2kd/modeling/feature_cache d2kd/modeling/teacher_passes" python benchmarks/cache.py
measure peers "benchmarks/peers.py $models" python benchmarks/peers.py
timm="benchmarks/timm_networks.py d2kd/modeling/backbone d2kd/modeling/meta_arch d2kd/engine/train_step.py $models"
measure timm_networks "$timm" python benchmarks/timm_networks.py
masked="benchmarks/masked_teacher.py d2kd/modeling/teacher_passes d2kd/layers d2lite/modeling/backbone"
measure masked_teacher "$masked" python benchmarks/masked_teacher.py
measure loading "benchmarks/loading.py d2kd/data" python benchmarks/loading.py
measure label_maps "benchmarks/label_maps.py d2kd/data" python benchmarks/label_maps.py
measure solo "benchmarks/solo.py d2kd/modeling/meta_arch/solo $models" python benchmarks/solo.py
measure evaluation "benchmarks/evaluation.py d2kd/evaluation d2lite/evaluation" python benchmarks/evaluation.py
measure check_pairs "benchmarks/check_pairs.py d2kd/engine/check.py d2kd/engine/check_report.py" python benchmarks/check_pairs.py
