"""A script as DeepSpeed's users write it. Changed for jaxinfer: the import, and the line that makes the model."""

import argparse
import os

from transformers import AutoTokenizer

import jaxinfer as deepspeed  # import deepspeed

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--local_rank", type=int, default=0)
args = parser.parse_args()
world_size = int(os.getenv("WORLD_SIZE", "1"))

tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = args.model  # model = AutoModelForCausalLM.from_pretrained(args.model, torch_dtype=torch.float16)

engine = deepspeed.init_inference(
    model,
    mp_size=world_size,
    dtype="fp16",
    replace_method="auto",
    replace_with_kernel_inject=True,
    max_out_tokens=64,
)
model = engine.module

prompts = ["DeepSpeed is", "A longer prompt than the first"]
inputs = tokenizer(prompts, return_tensors="np", padding=True)
outputs = model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.eos_token_id)
for text in tokenizer.batch_decode(outputs, skip_special_tokens=True):
    print(text)
