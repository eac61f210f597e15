// HTTP/1.1 load generator for OpenAI-compatible servers: one thread, epoll, loopback. Prints one JSON line, and a
// marker line when measuring starts and ends, so that whoever runs it can read CPU clocks at the same moments.
//
//   loadgen --port P --body FILE [--host 127.0.0.1] [--path /v1/chat/completions] [--mode closed] [--conns N]
//           [--headers FILE] [--rate R] [--ramp S] [--pace-ms MS] [--warmup S] [--duration S] [--requests N]
//
//   closed  each of N connections sends as soon as its answer is whole
//   open    R requests a second on schedule; latency counts from the schedule, not from a late send
//   stream  as closed, answers are SSE whose content is "@<CLOCK_MONOTONIC ns>" (mock.c): transit = now - stamp
//   sse     as closed, answers are SSE of any server: a token is a `data:` chunk with text in it. A chunk may carry
//           several tokens; usage_tokens / usage_chunks, summed over whole answers that told their usage, says how
//           many
//
// --headers: one `Name: value` a line (a file, because argv is world-readable and a key is among them).
// --requests: end after N whole answers, --duration being the limit then. Built by bench/kit.py: gcc -O2
// -Wall.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HDR, BODYLEN, CHSIZE, CHDATA, CHCRLF, TRAILER, UNTILEOF };

typedef struct {
    int fd, busy, conn, st, status, keep, done, broken;
    long rem; // bytes left of this body or chunk
    char h[8192];
    int hn;
    char ln[64]; // chunk-size line
    int lnn;
    long tsched, lasttok, ntok, usage;
    int indig; // inside an '@' stamp
    long dig;
    char line[4096]; // SSE line, the rest of a longer one is not looked at
    size_t linen;
    size_t sent;
} C;

typedef struct {
    float *a;
    size_t n, cap;
} V;

static V lat, ttft, transit, gap, jit;
static int ep, stamped, sse, openm, measuring;
static char *req;
static size_t reqn;
static struct sockaddr_in sa;
static long ok, err, tok, st4, st5, connfail, usage_tokens, usage_chunks, pace_ns, finished;

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void push(V *v, double x) {
    if (v->n == v->cap) {
        if (v->cap > 40000000)
            return;
        v->cap = v->cap ? v->cap * 2 : 65536;
        v->a = realloc(v->a, v->cap * sizeof(float));
    }
    v->a[v->n++] = x;
}

static int by_size(const void *a, const void *b) {
    float x = *(float *)a, y = *(float *)b;
    return x < y ? -1 : x > y;
}

static double quantile(V *v, double p) {
    return v->n ? v->a[(size_t)(p * (v->n - 1) + .5)] : -1;
}

static void print(const char *name, V *v) {
    double s = 0;
    for (size_t i = 0; i < v->n; i++)
        s += v->a[i];
    if (v->n)
        qsort(v->a, v->n, sizeof(float), by_size);
    printf(",\"%s\":{\"n\":%zu,\"mean\":%.4f,\"p50\":%.4f,\"p90\":%.4f,\"p99\":%.4f,\"p999\":%.4f,\"max\":%.4f}",
           name, v->n, v->n ? s / v->n : -1, quantile(v, .5), quantile(v, .9), quantile(v, .99), quantile(v, .999),
           quantile(v, 1));
}

static void watch(C *c, int op, unsigned events) {
    struct epoll_event e = {.events = events, .data.ptr = c};
    epoll_ctl(ep, op, c->fd, &e);
}

static void dial(C *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    connect(c->fd, (void *)&sa, sizeof sa);
    c->conn = 0;
    watch(c, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static void hang_up(C *c) {
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->conn = 0;
}

static void start(C *c, long sched) {
    c->busy = 1;
    c->st = HDR;
    c->hn = c->indig = c->done = c->broken = 0;
    c->ntok = c->lasttok = c->usage = 0;
    c->linen = c->sent = 0;
    c->tsched = sched;
    if (c->fd < 0) {
        dial(c);
        return;
    }
    if (!c->conn)
        return;
    ssize_t w = send(c->fd, req, reqn, MSG_NOSIGNAL);
    if (w > 0)
        c->sent = w;
    if (c->sent < reqn)
        watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

static void token(C *c, long t) {
    c->ntok++;
    if (measuring) {
        tok++;
        if (c->lasttok) {
            double g = (t - c->lasttok) / 1e6, j = g - pace_ns / 1e6;
            push(&gap, g);
            if (pace_ns)
                push(&jit, j < 0 ? -j : j);
        } else
            push(&ttft, (t - c->tsched) / 1e6);
    }
    c->lasttok = t;
}

// Stamps may be cut anywhere by a read; [DONE] is written whole by every server we know.
static void scan_stamps(C *c, char *p, size_t n, long t) {
    for (size_t i = 0; i < n; i++) {
        if (c->indig) {
            if (p[i] >= '0' && p[i] <= '9') {
                c->dig = c->dig * 10 + (p[i] - '0');
                continue;
            }
            c->indig = 0;
            if (c->dig > 1000000000L) {
                if (measuring)
                    push(&transit, (t - c->dig) / 1e6);
                token(c, t);
            }
        } else if (p[i] == '@') {
            c->indig = 1;
            c->dig = 0;
        } else if (p[i] == '[' && n - i >= 6 && !memcmp(p + i, "[DONE]", 6))
            c->done = 1;
    }
}

static int has_text(const char *line) {
    static const char *keys[] = {"\"content\":", "\"text\":"};
    for (int k = 0; k < 2; k++) {
        const char *p = strstr(line, keys[k]);
        if (p) {
            p += strlen(keys[k]);
            while (*p == ' ')
                p++;
            if (p[0] == '"' && p[1] != '"')
                return 1;
        }
    }
    return 0;
}

static void sse_line(C *c, long t) {
    c->line[c->linen] = 0;
    if (strncmp(c->line, "data:", 5))
        return;
    if (strstr(c->line, "[DONE]"))
        c->done = 1;
    else if (strstr(c->line, "\"error\":{"))
        c->broken = 1;
    else if (has_text(c->line))
        token(c, t);
    char *u = strstr(c->line, "\"completion_tokens\":");
    if (u)
        c->usage = atol(u + 20);
}

static void scan_sse(C *c, char *p, size_t n, long t) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] == '\n') {
            sse_line(c, t);
            c->linen = 0;
        } else if (c->linen < sizeof c->line - 1)
            c->line[c->linen++] = p[i];
    }
}

static void scan(C *c, char *p, size_t n, long t) {
    if (stamped)
        scan_stamps(c, p, n, t);
    else if (sse)
        scan_sse(c, p, n, t);
}

static void fail(C *c) {
    if (measuring)
        err++;
    hang_up(c);
    c->busy = 0;
}

static void finish(C *c) {
    int streaming = stamped || sse;
    int good = c->status == 200 && !c->broken && (!streaming || (c->done && c->ntok > 0));
    finished++;
    if (measuring) {
        if (good) {
            ok++;
            push(&lat, (now() - c->tsched) / 1e6);
        } else {
            err++;
            st4 += c->status / 100 == 4;
            st5 += c->status / 100 == 5;
        }
        if (c->usage) {
            usage_tokens += c->usage;
            usage_chunks += c->ntok;
        }
    }
    c->busy = 0;
    if (!c->keep)
        hang_up(c);
}

static int head_done(C *c) { // 1 when the answer ends with its head
    char *x;
    c->h[c->hn] = 0;
    c->status = atoi(c->h + 9);
    if (c->status == 100) {
        c->hn = 0;
        return 0;
    }
    c->keep = !strcasestr(c->h, "\r\nconnection: close");
    if (strcasestr(c->h, "\r\ntransfer-encoding: chunked")) {
        c->st = CHSIZE;
        c->lnn = 0;
    } else if ((x = strcasestr(c->h, "\r\ncontent-length:"))) {
        c->rem = atol(x + 17);
        c->st = BODYLEN;
        return !c->rem;
    } else {
        c->st = UNTILEOF;
        c->keep = 0;
    }
    return 0;
}

static int feed(C *c, char *p, size_t n, long t) { // 1 when the answer is whole
    while (n) {
        if (c->st == BODYLEN || c->st == CHDATA) {
            size_t k = n < (size_t)c->rem ? n : (size_t)c->rem;
            scan(c, p, k, t);
            p += k;
            n -= k;
            c->rem -= k;
            if (!c->rem) {
                if (c->st == BODYLEN)
                    return 1;
                c->st = CHCRLF;
            }
            continue;
        }
        if (c->st == UNTILEOF) {
            scan(c, p, n, t);
            return 0;
        }
        char ch = *p++;
        n--;
        switch (c->st) {
        case HDR:
            if (c->hn < (int)sizeof c->h - 1)
                c->h[c->hn++] = ch;
            if (c->hn >= 4 && !memcmp(c->h + c->hn - 4, "\r\n\r\n", 4) && head_done(c))
                return 1;
            break;
        case CHSIZE:
            if (ch == '\n') {
                c->ln[c->lnn] = 0;
                c->rem = strtol(c->ln, 0, 16);
                c->lnn = 0;
                c->st = c->rem ? CHDATA : TRAILER;
            } else if (c->lnn < 60)
                c->ln[c->lnn++] = ch;
            break;
        case CHCRLF:
            if (ch == '\n') {
                c->st = CHSIZE;
                c->lnn = 0;
            }
            break;
        case TRAILER:
            if (ch == '\n') {
                if (c->lnn == 0)
                    return 1;
                c->lnn = 0;
            } else if (ch != '\r')
                c->lnn++;
            break;
        }
    }
    return 0;
}

static const char *host = "127.0.0.1", *path = "/v1/chat/completions", *mode = "closed", *body_file, *headers_file;
static int port, N = 64;
static long limit;
static double rate, warm = 2, dur = 10, ramp;

static int parse_args(int ac, char **av) {
    struct {
        const char *name;
        char kind;
        void *to;
    } known[] = {{"--host", 's', &host},
                 {"--path", 's', &path},
                 {"--mode", 's', &mode},
                 {"--body", 's', &body_file},
                 {"--port", 'i', &port},
                 {"--conns", 'i', &N},
                 {"--headers", 's', &headers_file},
                 {"--rate", 'd', &rate},
                 {"--warmup", 'd', &warm},
                 {"--duration", 'd', &dur},
                 {"--ramp", 'd', &ramp},
                 {"--requests", 'l', &limit},
                 {"--pace-ms", 'p', &pace_ns}};
    for (int i = 1; i < ac; i += 2) {
        size_t k = 0, n = sizeof known / sizeof *known;
        while (k < n && strcmp(av[i], known[k].name))
            k++;
        if (k == n || i + 1 == ac) {
            fprintf(stderr, "loadgen: %s: unknown option, or its value is missing\n", av[i]);
            return 0;
        }
        char *v = av[i + 1];
        switch (known[k].kind) {
        case 's':
            *(const char **)known[k].to = v;
            break;
        case 'i':
            *(int *)known[k].to = atoi(v);
            break;
        case 'l':
            *(long *)known[k].to = atol(v);
            break;
        case 'd':
            *(double *)known[k].to = atof(v);
            break;
        case 'p':
            pace_ns = atof(v) * 1e6;
            break;
        }
    }
    if (!port || !body_file || N < 1)
        fprintf(stderr, "loadgen: --port, --body and --conns are needed\n");
    return port && body_file && N >= 1;
}

static size_t slurp(const char *file, char *to, size_t cap) {
    FILE *f = fopen(file, "rb");
    if (!f) {
        perror(file);
        exit(2);
    }
    size_t n = fread(to, 1, cap, f);
    fclose(f);
    return n;
}

static void prepare(void) {
    static char body[1 << 21], lines[4096], heads[8192];
    size_t bn = slurp(body_file, body, sizeof body), used = 0;
    if (headers_file) {
        lines[slurp(headers_file, lines, sizeof lines - 1)] = 0;
        for (char *l = strtok(lines, "\r\n"); l; l = strtok(0, "\r\n"))
            used += snprintf(heads + used, sizeof heads - used, "%s\r\n", l);
    }
    req = malloc(bn + used + 1024 + strlen(path));
    reqn = sprintf(req,
                   "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nAccept: */*\r\n"
                   "User-Agent: loadgen\r\n%sContent-Length: %zu\r\n\r\n",
                   path, host, port, heads, bn);
    memcpy(req + reqn, body, bn);
    reqn += bn;
    sa.sin_family = AF_INET;
    sa.sin_port = htons(port);
    inet_pton(AF_INET, host, &sa.sin_addr);
    stamped = !strcmp(mode, "stream");
    sse = !strcmp(mode, "sse");
    openm = !strcmp(mode, "open");
}

static C **idle; // open mode: connections free for the next request
static int top;

static void again(C *c) {
    if (openm)
        idle[top++] = c;
    else
        start(c, now());
}

static void writable(C *c) {
    if (!c->conn) {
        int e = 0;
        socklen_t l = sizeof e;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &e, &l);
        if (e) {
            connfail++;
            fail(c);
            usleep(1000);
            again(c);
            return;
        }
        c->conn = 1;
    }
    if (c->sent < reqn && c->busy) {
        ssize_t k = send(c->fd, req + c->sent, reqn - c->sent, MSG_NOSIGNAL);
        if (k > 0)
            c->sent += k;
    }
    if (c->sent >= reqn)
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void readable(C *c) {
    static char buf[262144];
    ssize_t r = recv(c->fd, buf, sizeof buf, 0);
    if (r < 0 && errno == EAGAIN)
        return;
    if (r <= 0) {
        if (!c->busy) {
            hang_up(c);
            return;
        }
        if (c->st == UNTILEOF && r == 0)
            finish(c);
        else
            fail(c);
        again(c);
    } else if (c->busy && feed(c, buf, r, now())) {
        finish(c);
        again(c);
    }
}

int main(int ac, char **av) {
    if (!parse_args(ac, av))
        return 2;
    prepare();
    ep = epoll_create1(0);
    C *cs = calloc(N, sizeof(C));
    idle = calloc(N, sizeof(C *));
    for (int i = N - 1; i >= 0; i--) {
        cs[i].fd = -1;
        if (openm)
            idle[top++] = &cs[i];
    }
    long t0 = now(), tm = t0 + (long)(warm * 1e9), te = tm + (long)(dur * 1e9), m0 = 0, m1;
    long period = rate > 0 ? (long)(1e9 / rate) : 1000000, next = t0, missed = 0;
    int launched = 0;
    static struct epoll_event ev[1024];
    for (;;) {
        long t = now();
        if (!measuring && t >= tm && t < te) {
            measuring = 1;
            m0 = t;
            printf("{\"marker\":\"measure_start\",\"t\":%ld}\n", t);
            fflush(stdout);
        }
        if (t >= te || (limit && finished >= limit)) {
            m1 = t;
            break;
        }
        for (; openm && next <= t; next += period) {
            if (top > 0)
                start(idle[--top], next);
            else {
                missed++;
                err += measuring;
            }
        }
        for (; !openm && launched < N && (ramp <= 0 || t - t0 >= (long)(ramp * 1e9 * launched / N)); launched++)
            start(&cs[launched], now());
        long w = openm ? next - now() : launched < N ? (long)(ramp * 1e9 * launched / N) - (now() - t0) : 2000000;
        struct timespec ts = {0, w < 0 ? 0 : w > 2000000 ? 2000000 : w};
        int n = epoll_pwait2(ep, ev, 1024, &ts, 0);
        for (int i = 0; i < n; i++) {
            C *c = ev[i].data.ptr;
            if (c->fd >= 0 && ev[i].events & EPOLLOUT)
                writable(c);
            if (c->fd >= 0 && ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                readable(c);
        }
    }
    measuring = 0;
    double el = (m1 - m0) / 1e9;
    printf("{\"marker\":\"measure_end\",\"t\":%ld}\n", m1);
    fflush(stdout);
    printf("{\"mode\":\"%s\",\"conns\":%d,\"elapsed\":%.3f,\"ok\":%ld,\"err\":%ld,\"http4xx\":%ld,\"http5xx\":%ld,"
           "\"connfail\":%ld,\"missed\":%ld,\"rps\":%.1f,\"tokens\":%ld,\"tok_s\":%.1f,\"usage_tokens\":%ld,"
           "\"usage_chunks\":%ld,\"finished\":%ld",
           mode, N, el, ok, err, st4, st5, connfail, missed, ok / el, tok, tok / el, usage_tokens, usage_chunks,
           finished);
    print("lat_ms", &lat);
    if (stamped || sse) {
        print("ttft_ms", &ttft);
        print("gap_ms", &gap);
    }
    if (stamped) {
        print("transit_ms", &transit);
        print("jitter_ms", &jit);
    }
    printf("}\n");
    return 0;
}
