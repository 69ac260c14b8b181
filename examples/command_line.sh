#!/bin/sh
# From a text to a model that fills blanks, and on to one that tells chapters apart, one command a stage.
#
#   sh examples/command_line.sh                                   # the French sample, minutes on a laptop CPU
#   sh examples/command_line.sh my_text.jsonl my_folder --steps 2000 --model.preset fat5-small
#
# The first argument is the text (a file, a folder or a dataset of the hub), the second a new folder; those behind them
# are keys of `fat5 pretrain`. TASK_DATA and LABEL name labelled text and the column of its labels.
set -eu
text=${1:-sample:fr}
folder=${2:-example}
if [ $# -gt 2 ]; then shift 2; else set --; fi

mkdir -p "$folder"
fat5 tokenizer "$text" --output_dir "$folder/tokenizer" --vocab_size "${VOCAB_SIZE:-4096}"
fat5 prepare "$text" --tokenizer "$folder/tokenizer" --output_dir "$folder/shards" --validation_fraction 0.05
fat5 pretrain --data.sources "[{path: $folder/shards}]" --output_dir "$folder/run" "$@"
fat5 generate --model "$folder/run" "${PROMPT:-Le paquet est installé par la commande ___ dans le terminal.}"
fat5 finetune --model "$folder/run" --task sequence-classification --data.train "${TASK_DATA:-sample:fr}" \
  --data.columns.label "${LABEL:-chapter}" --epochs "${EPOCHS:-3}" --output_dir "$folder/task"
