"""Examples of every command, for its help."""

SEVERAL = "torchrun --nproc-per-node 4 --max-restarts 3 "
"""How an example begins that runs in several processes"""
EXAMPLES = {
    "info": ["info"],
    "train": [
        "train",
        "train --data book.txt notes --glob '*.txt' --glob '*.md' --minutes 30 --out runs/prose",
        "train --out runs/prose --resume --minutes 60",
        "train --tokenizer bpe.json --data book.txt",
        "train --data tokens --out runs/long",
        "train --steps 2000 --dim 256 --layers 6 --chunk 512 --lr 3e-3 --seed 1",
        f"{SEVERAL}train --mesh data=2,chunk=2 --batch 4 --length 8192 --chunk 1024 --out runs/four",
    ],
    "eval": [
        "eval --checkpoint runs/prose",
        "eval --checkpoint runs/prose --data other.txt --context 2048 8192 32768 all",
        "eval --checkpoint runs/prose --data other.txt --json figures.json --by-position loss.png --piece 8192",
    ],
    "generate": [
        "generate --checkpoint runs/prose --prompt 'Call me ' --bytes 500",
        "generate --checkpoint runs/prose --prompt-file - --temperature 0.7 --top-p 0.9 < chapter.txt",
        "generate --checkpoint runs/prose --prompt 'Q: ' --stop 'Q:' --samples 3 --tokens 100 --min-p 0.05",
    ],
    "tokenizer": [
        "tokenizer --train --vocab-size 4096 --out bpe.json book.txt notes --glob '*.txt'",
        "tokenizer --tokenizer bpe.json other.txt",
    ],
    "tokenize": [
        "tokenize --tokenizer bpe.json --out tokens crawl.jsonl books --workers 8",
        "tokenize --check --out tokens",
    ],
    "convert": [
        "convert --from official --to own released/ model/",
        "convert --from own --to official --shards 2 runs/prose released/",
        "convert --from port --to hf port/ model/ --tokens ids.txt",
    ],
    "plan": [
        "plan --preset paper7B --devices 256 --mesh data=128,chunk=2 --context 32768 --card a100",
        "plan --preset mega1.3B --mesh data=8 --context 8192 --batch 64 --card h100 --recompute --efficiency 0.4",
        "plan --config runs/prose --card cpu --memory 64 --tflops 2 --bandwidth 100 --dtype float32 --json -",
    ],
}
"""Examples of every command for its help; the main help shows the first of each command"""
