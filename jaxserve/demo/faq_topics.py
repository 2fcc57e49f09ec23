# ruff: noqa: E501  (one answer a line reads better than wrapped ones)
"""What the demo model knows about jaxserve, and its small talk.

Each topic: a short name, the one right answer, and ways to ask. The last way to ask is never used
in training; it tests whether the model finds the topic behind new words.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """One question with its answer."""

    name: str
    answer: str
    ways: tuple[str, ...]


def _topic(name: str, answer: str, ways: str) -> Topic:
    return Topic(name, answer, tuple(way.strip() for way in ways.split("|")))


TOPICS: tuple[Topic, ...] = (
    _topic("jaxserve itself", "jaxserve is an LLM inference engine written in JAX. It runs Hugging Face checkpoints on GPU, TPU and CPU.",
        "What is jaxserve?|Tell me about jaxserve.|What does jaxserve do?|Explain jaxserve in short.|What is this project?|What kind of program is jaxserve?|Describe jaxserve to me."),
    _topic("installation", "Install it with `pip install jaxserve`. For NVIDIA GPUs use `pip install \"jaxserve[cuda]\"`.",
        "How do I install jaxserve?|How can I install it?|What is the install command?|How to install jaxserve with pip?|How do I set up jaxserve?|Which command installs jaxserve?|How do I get jaxserve on my machine?"),
    _topic("TPU installation", "Use `pip install \"jaxserve[tpu]\"` on a TPU machine.",
        "How do I install jaxserve for TPU?|How do I install it on a TPU?|What is the TPU install command?|Which extra is for TPU?|How to set up a TPU machine?"),
    _topic("generating text", "Run `jaxserve generate \"Once upon a time\"`. Add `--model` with a path or a name for your own model.",
        "How do I generate text?|How do I use jaxserve generate?|Which command generates text?|How can I complete a prompt from the command line?|What does jaxserve generate do?|How do I run one prompt?|How do I make it write text from a shell?"),
    _topic("chatting", "Run `jaxserve chat`. With no model given it talks to me, the demo model.",
        "How do I chat?|How do I start a chat?|Which command starts a chat?|What does jaxserve chat do?|How can I chat with a model?|How do I talk to a model in the terminal?|How can I have a conversation with it?"),
    _topic("converting", "Run `jaxserve convert` with the model and an output folder. It writes an Orbax checkpoint that loads fast.",
        "How do I convert a checkpoint?|What does jaxserve convert do?|How do I make an Orbax checkpoint?|Which command converts a model?|How do I convert a Hugging Face model?|How does Orbax conversion work?|How can I turn my weights into Orbax?"),
    _topic("the doctor", "Run `jaxserve doctor`. It checks your devices, drivers and library versions and says what is wrong.",
        "What does jaxserve doctor do?|How do I check my installation?|Which command checks my setup?|How do I find out what is wrong?|Does jaxserve see my GPU?|How do I diagnose a problem?|How can I test that my machine is ready?"),
    _topic("the LLM class", "Write `from jaxserve import LLM, SamplingParams`, then `LLM(model).generate(prompts, SamplingParams())`.",
        "How do I use the LLM class?|What is the LLM class?|How do I use jaxserve from Python?|How do I call it from Python code?|Show me the Python API.|How do I import jaxserve?|Can I use it in a Python script?"),
    _topic("chat from Python", "Call `LLM.chat(messages)` with a list of messages. It applies the chat template for you.",
        "How do I chat from Python?|What does LLM.chat do?|How do I send messages from Python?|How do I apply the chat template?|Which method takes a list of messages?"),
    _topic("two GPUs", "Use `--tensor-parallel-size 2`, or `-tp 2` for short. It splits the model over two GPUs.",
        "Which flags use two GPUs?|How do I use two GPUs?|Which flag uses two GPUs?|How do I run on 2 GPUs?|How can I split a model over two GPUs?|What flag do I need for two GPUs?|How do I use 2 GPUs?|How to use both of my GPUs?|I have two GPUs. Which flag do I use?|Can I spread a model across two cards?"),
    _topic("tensor parallelism", "Tensor parallelism splits each layer over several devices. Set it with `--tensor-parallel-size` or `-tp`.",
        "What is tensor parallelism?|What does --tensor-parallel-size do?|What does -tp mean?|How do I set tensor parallelism?|Explain tensor parallelism.|What is the -tp flag for?"),
    _topic("page size", "Set the page size with `--block-size`. It is the number of tokens in one KV page.",
        "How do I set the page size?|What does --block-size do?|Which flag sets the page size?|What is the block size?|How many tokens are in a page?|How do I change the size of a KV page?"),
    _topic("context length", "Set it with `--max-model-len`. It is the largest number of tokens in one request, prompt and answer together.",
        "How do I set the context length?|What does --max-model-len do?|Which flag sets the maximum length?|How do I limit the context?|How long can a request be?|Which option bounds the tokens of a request?"),
    _topic("batch size", "Use `--max-num-seqs`. It is the largest number of requests that run at the same time.",
        "What does --max-num-seqs do?|How do I set the batch size?|How many requests run at once?|Which flag limits the number of requests?|How do I change the maximum batch size?|How do I allow more requests at a time?"),
    _topic("memory", "Use `--gpu-memory-utilization`. It is the share of device memory that jaxserve may use, for example 0.9.",
        "What does --gpu-memory-utilization do?|How do I limit GPU memory?|How do I set the memory share?|Which flag controls memory?|How much GPU memory is used?|How do I leave memory for other programs?"),
    _topic("running out of memory", "Lower `--max-model-len` or `--max-num-seqs`, or use more GPUs with `-tp`.",
        "I am out of memory. What can I do?|How do I fix an out of memory error?|It runs out of memory.|What helps against out of memory?|My GPU memory is full. What now?|The model does not fit. What should I try?"),
    _topic("prefix caching", "Prefix caching keeps the KV pages of earlier prompts, so a shared beginning is computed only once.",
        "What is prefix caching?|How does prefix caching work?|Explain prefix caching.|What does the prefix cache do?|Why is a second prompt faster?|How are shared prompts reused?"),
    _topic("chunked prefill", "Chunked prefill cuts a long prompt into pieces, so other requests keep getting tokens meanwhile.",
        "What is chunked prefill?|How does chunked prefill work?|Explain chunked prefill.|What happens with a long prompt?|How are long prompts handled?|Why are prompts cut into chunks?"),
    _topic("preemption", "When pages run out, the newest request is preempted: its pages are freed and it is recomputed later, with the same tokens.",
        "What is preemption?|How does preemption work?|What happens when pages run out?|Explain preemption by recompute.|Is a preempted request lost?|What happens if the KV cache is full?|What does the engine do when no page is free?"),
    _topic("paged KV", "The KV cache is cut into pages of equal size. A page table says which pages belong to a request.",
        "What is paged KV?|How does the paged KV cache work?|Explain paged attention.|What is a page table?|What is a KV page?|How is the KV cache stored?|How is the memory of keys and values organised?"),
    _topic("continuous batching", "With continuous batching, requests join and leave the batch at every step, so none waits for the longest.",
        "What is continuous batching?|How does continuous batching work?|Explain continuous batching.|How are requests batched?|When can a new request join the batch?|How does it mix many requests?"),
    _topic("warm-up", "Warm-up compiles every shape before the first request, so no request waits for the compiler.",
        "What is warm-up?|What happens during warm-up?|Why does it warm up?|What does warm-up do?|Why does the start take time?|What is compiled at the start?"),
    _topic("the compile cache", "Compiled programs are kept on disk. Set `JAX_COMPILATION_CACHE_DIR` to choose the folder; the next start is then much faster.",
        "What is the compile cache?|How does the compile cache work?|Where are compiled programs kept?|How do I make the start faster?|How do I set the cache folder?|How do I avoid compiling again?"),
    _topic("sampling parameters", "Pass `SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64)`. Temperature 0 means greedy.",
        "What are sampling parameters?|How do I set the temperature?|How do I use SamplingParams?|How do I set top_p?|How do I set sampling params?|What is SamplingParams?|How do I make answers more random?"),
    _topic("greedy decoding", "Set `temperature=0`. The most likely token is then taken at every step.",
        "How do I use greedy decoding?|What is greedy decoding?|How do I get the same answer every time?|What does temperature 0 mean?|How do I turn off sampling?|How do I make the output not random?"),
    _topic("answer length", "Set `max_tokens` in SamplingParams.",
        "How do I limit the answer length?|What does max_tokens do?|How do I get longer answers?|How do I get shorter answers?|Which setting bounds the number of new tokens?"),
    _topic("stop strings", "Pass `stop=[\"END\"]` in SamplingParams. Generation ends when one of the strings appears, and the string is cut off.",
        "How do I use stop strings?|What are stop strings?|How do I stop at a word?|How do I set a stop string?|How do I make it stop early?|Can generation end at a certain text?"),
    _topic("seeds", "Pass `seed=0` in SamplingParams. The same seed gives the same tokens, whatever else is in the batch.",
        "How do I set a seed?|What does the seed do?|How do I get reproducible samples?|How do seeds work?|Can I repeat a random answer?|How can sampling be made repeatable?"),
    _topic("logprobs", "Pass `logprobs=5` in SamplingParams. Each token then comes with its log probability and the five best ones.",
        "How do I get logprobs?|What are logprobs?|How do I see token probabilities?|How do I use logprobs?|Can I get log probabilities?|How do I find out how likely a token was?"),
    _topic("running on CPU", "Set `JAX_PLATFORMS=cpu`. Everything runs on the CPU then, only slower.",
        "How do I run on CPU?|What does JAX_PLATFORMS=cpu do?|Can I run it without a GPU?|How do I force the CPU?|Do I need a GPU?|Does it work on a laptop?|How do I use it on a machine with no accelerator?"),
    _topic("the server", "Run `jaxserve serve`. It speaks the OpenAI API on port 8000.",
        "How do I start the server?|How do I serve a model?|Is there an OpenAI API?|Which command starts the server?|Which port does the server use?|How do I offer a model over HTTP?"),
    _topic("speculative decoding", "A small draft model guesses several tokens and the big model checks them in one step. The text stays the same.",
        "What is speculative decoding?|How does speculative decoding work?|What is a draft model?|Explain speculative decoding.|Why use a draft model?|What is the draft for?"),
    _topic("the name of the flags", "jaxserve uses the flag names of vLLM where the meaning is the same.",
        "Are the flags like in vLLM?|Which flag names does it use?|Can I use vLLM flags?|Is it like vLLM?|Do I have to learn new flags?"),
    _topic("the licence", "jaxserve is free software under the Apache 2.0 licence.",
        "What is the license?|What is the licence of jaxserve?|Is jaxserve free?|Is it open source?|May I use it at work?"),
    _topic("myself", "I am the jaxserve demo, a toy model with 5 million parameters. I am here for trying the engine, not for quality.",
        "Who are you?|What are you?|What is your name?|Are you a large model?|Tell me about yourself.|How big are you?|How many parameters do you have?|Are you ChatGPT?|Which model is this?|Introduce yourself."),
    _topic("what I can do", "I can answer questions about jaxserve, tell short stories, call tools, write JSON, repeat words and add small numbers.",
        "What can you do?|How can you help me?|What do you know?|Help!|What should I ask you?|Give me some ideas for what to ask."),
    _topic("how I was made", "I was trained in a few minutes on text that a program wrote. The script is `python -m jaxserve.demo.train`.",
        "How were you trained?|Who made you?|How were you made?|What is your training data?|Where do you come from?|Which data did you learn from?"),
    _topic("greetings", "Hello! I am the jaxserve demo. Ask me about jaxserve, or ask for a story.",
        "Hello!|Hi!|Hello|Hi|Hey there!|Good morning!|Good evening!|Hello there!|Hi, demo!|Good afternoon!"),
    _topic("how I am", "I am fine, thank you. All my weights are in place.",
        "How are you?|How are you today?|How do you do?|Are you well?|How is it going?|Are you feeling fine?"),
    _topic("thanks", "You are welcome!",
        "Thanks!|Thank you!|Thank you very much!|Thanks a lot!|Thanks, that helps.|Great, thank you.|Many thanks!"),
    _topic("good-bye", "Good-bye, and happy serving!",
        "Bye!|Goodbye!|See you!|Bye bye!|See you later!|Good night!|I have to go now."),
    _topic("a joke", "Why did the token cross the page? It had run out of slots on the other side.",
        "Tell me a joke.|Do you know a joke?|Make me laugh.|Say something funny.|Another joke, please.|I want to hear a joke."),
)  # fmt: skip
