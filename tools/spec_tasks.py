"""Ten tasks for a pair of real models: what people ask of a code model, with prompts of 30 to 1,500 tokens.

Texts are part of this file, so that a task is the same on every commit.
"""

from typing import NamedTuple

QUEUE = '''\
import heapq
import itertools
import threading
import time


class Job:
    def __init__(self, name, func, args, priority, delay):
        self.name = name
        self.func = func
        self.args = args
        self.priority = priority
        self.due = time.monotonic() + delay
        self.result = None
        self.error = None
        self.done = threading.Event()

    def run(self):
        try:
            self.result = self.func(*self.args)
        except Exception as error:
            self.error = error
        finally:
            self.done.set()

    def wait(self, timeout=None):
        if not self.done.wait(timeout):
            raise TimeoutError(self.name)
        if self.error is not None:
            raise self.error
        return self.result


class Queue:
    def __init__(self, workers=2):
        self.heap = []
        self.counter = itertools.count()
        self.lock = threading.Condition()
        self.closed = False
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def add(self, name, func, *args, priority=0, delay=0.0):
        job = Job(name, func, args, priority, delay)
        with self.lock:
            if self.closed:
                raise RuntimeError("the queue is closed")
            heapq.heappush(self.heap, (job.due, -priority, next(self.counter), job))
            self.lock.notify()
        return job

    def take(self):
        with self.lock:
            while True:
                if self.heap:
                    wait = self.heap[0][0] - time.monotonic()
                    if wait <= 0:
                        return heapq.heappop(self.heap)[-1]
                    self.lock.wait(wait)
                elif self.closed:
                    return None
                else:
                    self.lock.wait()

    def work(self):
        while (job := self.take()) is not None:
            job.run()

    def close(self):
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        for thread in self.threads:
            thread.join()
'''

CSV = '''\
def parse_line(line, sep=","):
    fields = []
    field = ""
    quoted = False
    i = 0
    while i < len(line):
        c = line[i]
        if quoted:
            if c == '"' and line[i + 1:i + 2] == '"':
                field += c
                i += 1
            elif c == '"':
                quoted = False
            else:
                field += c
        elif c == '"':
            quoted = True
        elif c == sep:
            fields.append(field)
            field = ""
        else:
            field += c
        i += 1
    fields.append(field)
    return fields


def read_table(path, sep=","):
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\\n") for line in file]
    header = parse_line(lines[0], sep)
    rows = []
    for number, line in enumerate(lines[1:], 2):
        fields = parse_line(line, sep)
        if len(fields) != len(header):
            raise ValueError(f"{path}: line {number} has {len(fields)} fields, the header has {len(header)}")
        rows.append(dict(zip(header, fields)))
    return rows


def column(rows, name):
    return [float(row[name]) for row in rows if row[name]]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def group(rows, key, value):
    groups = {}
    for row in rows:
        if row[value]:
            groups.setdefault(row[key], []).append(float(row[value]))
    return {name: mean(values) for name, values in groups.items()}
'''

ARTICLE = '''\
The harbour of Westmere was built in 1871, when the railway company needed a place to unload coal for its engines. The
first quay was of timber and stood for only nineteen years. A storm in January 1890 broke it in three places, and the
company decided to build the second one of granite, which came by barge from a quarry forty miles up the coast. The work
took six years and the lives of eleven men, whose names are on a plate beside the lighthouse.

For half a century the harbour did well. In 1913, its best year, 2,140 ships called there, most of them with coal going
out and timber coming in. Some 900 people worked on the quays, and the town grew from a village of 600 to a place of 14,000.
The fish market opened in 1902 and soon sold more herring than any other on that coast; special trains carried it to the
capital overnight. The company also built a school, a hospital with forty beds, and a park whose palm house is still open
to visitors on Sundays.

The decline began with oil. Between 1925 and 1938 the coal trade fell by two thirds, and when the herring moved north after
the war the fish market closed as well. The railway line lost its passenger trains in 1964 and its last goods train in
1981. By then only three fishing boats and a dredger used the inner basin, and the eastern quay was fenced off because
stones were falling into the water. The town had 8,500 inhabitants left, and every fourth of them was out of work.

What happened next surprised nearly everybody. In 1994 a group of eleven citizens, among them a retired harbour pilot and
two teachers, bought the old pumping station for a single pound and turned it into a workshop for wooden boats. They
trained young people who had left school without a certificate. In ten years 160 apprentices passed through the workshop;
four out of five found work afterwards, many with yards along the coast. The workshop restored a herring drifter of 1908,
which now takes visitors out to the seal banks and earns a third of the society's income.

In 2006 the council accepted a plan to open the basin to pleasure boats. It was not loved at first: fishermen feared for
their moorings, and a petition against the plan was signed by 2,300 people. The compromise reserved the northern quay for
working boats at a fixed rent for thirty years. The marina has 180 berths today, with a waiting list of two years. A wind
farm off the coast brought the second change. Since 2015 its service boats have used the granite quay, which was repaired
for 6.4 million pounds, half of it paid by the operator. About 210 technicians work there in shifts.

The town has 10,200 inhabitants again, and unemployment is below the national average. Not all problems are solved. The
road to the harbour is too narrow for the lorries that carry turbine parts, rents have risen by 40 percent in ten years,
and each winter the sea takes another metre of the southern dunes. The council wants to raise the sea wall by 80
centimetres before 2030, and nobody knows yet who will pay for it.
'''  # noqa: E501

DOCSTRING = '''\
Open a file and return a stream. Raise OSError upon failure.

The first argument is either a text or byte string giving the name (and the path if the file isn't in the current
working directory) of the file to be opened, or an integer file descriptor of the file to be wrapped. If a file
descriptor is given, it is closed when the returned object is closed, unless closing is switched off. The mode is an
optional string that specifies the mode in which the file is opened. It defaults to reading in text mode. Other common
values are writing, which truncates the file if it already exists, exclusive creation, and appending, which on some
systems means that all writes go to the end of the file regardless of the current position. In text mode, if no encoding
is given, the encoding used is platform dependent. For reading and writing raw bytes use binary mode and leave the
encoding unspecified. Buffering is an optional integer used to set the buffering policy: zero switches buffering off,
which is only allowed in binary mode, one selects line buffering, and a larger number gives the size of the buffer.
'''  # noqa: E501


class Task(NamedTuple):
    """A request in the chat template, and at most n tokens of its answer."""

    name: str
    prompt: str
    temperature: float
    n: int = 256


TASKS = [
    Task("rewrite a file, types",
         f"Rewrite this file with type annotations on every function. Print the whole file.\n\n{QUEUE}", 0.0),
    Task("rewrite a file, names", "Rename `field` to `cell` and `rows` to `records` in this file. Print the "
                                  f"whole file.\n\n{CSV}", 0.8),
    Task("write code",
         "Write a Python class for an LRU cache with a time limit for each entry, with get, put, delete and "
         "a method that drops expired entries. Add docstrings and a short example.", 0.0),
    Task("write code, sampled",
         "Write a command line program in Python that finds duplicate files in a folder by their size and "
         "hash, and prints them in groups. Explain nothing, print the program.", 0.8),
    Task("explain", "Explain step by step, in prose, how this code works and where it could fail.\n\n"
                    f"{CSV}", 0.0),
    Task("list as JSON",
         "List the twelve months as a JSON array of objects with the keys name, number, days, season "
         "(northern hemisphere) and zodiac_signs (a list). Print only JSON.", 0.0),
    Task("summarise", "Summarise this text as bullet points, one for each important fact.\n\n"
                      f"{ARTICLE}", 0.0),
    Task("summarise, sampled", "Retell this text for children of ten years, in your own words.\n\n"
                               f"{ARTICLE}", 0.8),
    Task("translate", f"Translate this documentation into German.\n\n{DOCSTRING}", 0.0),
    Task("chat turn, long prompt",
         f"Here is a file:\n\n{QUEUE}\n\nAnd another one:\n\n{CSV}\n\nAnd a note:\n\n{ARTICLE}\n\n"
         "In one sentence: which of the two files uses threads?", 0.0, 30),
]
