/* The limit: what one process can do at all with a write per stream.
 *
 *     server PORT
 *
 * A plain epoll loop, as in epoll(7): streams sit in an array, an event is formatted once and
 * written to each. No queue (a stream whose socket is full is closed), no heartbeat, no limit, no
 * session, no id that survives a restart: nothing that a real service needs is paid for here.
 *
 *     GET  /all, /own/user-N     a stream
 *     POST /all, /own/user-N     the body goes to those streams as the data of one event
 */

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 1048576
#define REQUEST 16384
#define ALL (-1)

static const char STREAM[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                             "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";
static const char DONE[] = "HTTP/1.1 204 No Content\r\n\r\n";

/* By descriptor: what has been read of its request; by user: descriptor + 1. */
static struct { char *request; size_t length; int user; int place; bool stream; } *client;
static int *own, *everybody, count, epoll;

static void leave(int fd)
{
    if (client[fd].stream && client[fd].user == ALL) {
        int last = everybody[--count];
        everybody[client[fd].place] = last;
        client[last].place = client[fd].place;
    } else if (client[fd].stream && own[client[fd].user] == fd + 1) {
        own[client[fd].user] = 0;
    }
    free(client[fd].request);
    memset(&client[fd], 0, sizeof client[fd]);
    close(fd);
}

static void deliver(int fd, const char *frame, size_t length)
{
    if (send(fd, frame, length, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)length)
        shutdown(fd, SHUT_RDWR); /* epoll reports it, and the array stays as it is meanwhile */
}

static void publish(int user, const char *data, size_t length)
{
    static unsigned long id;
    static char event[REQUEST + 128], frame[REQUEST + 256];
    int size = snprintf(event, sizeof event, "id: %lu\nevent: notification\ndata: %.*s\n\n", ++id,
                        (int)length, data);
    size = snprintf(frame, sizeof frame, "%x\r\n%s\r\n", (unsigned)size, event);
    if (user != ALL) {
        if (own[user])
            deliver(own[user] - 1, frame, (size_t)size);
        return;
    }
    for (int i = 0; i < count; i++)
        deliver(everybody[i], frame, (size_t)size);
}

/* One request at the start of what has been read. Returns its length, 0 if it is not all there. */
static size_t request(int fd, char *text)
{
    char *end = strstr(text, "\r\n\r\n");
    if (end == NULL)
        return 0;
    size_t head = (size_t)(end + 4 - text), body = 0;
    char *length = strcasestr(text, "\r\nContent-Length:");
    if (length != NULL && length < end)
        body = strtoul(length + 17, NULL, 10);
    if (strlen(text + head) < body)
        return 0;
    char *path = strchr(text, '/');
    int user = path != NULL && !strncmp(path, "/own/user-", 10) ? atoi(path + 10) : ALL;
    if (user < ALL || user >= MOST)
        user = 0;
    if (!strncmp(text, "POST ", 5)) {
        publish(user, text + head, body);
        deliver(fd, DONE, sizeof DONE - 1);
    } else {
        client[fd].stream = true;
        client[fd].user = user;
        if (user == ALL) {
            client[fd].place = count;
            everybody[count++] = fd;
        } else {
            own[user] = fd + 1;
        }
        deliver(fd, STREAM, sizeof STREAM - 1);
    }
    return head + body;
}

static void receive(int fd)
{
    static char text[REQUEST + 1];
    size_t kept = client[fd].length;
    if (kept)
        memcpy(text, client[fd].request, kept);
    ssize_t got = recv(fd, text + kept, REQUEST - kept, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        leave(fd);
        return;
    }
    size_t length = kept + (size_t)got, at = 0, taken;
    text[length] = '\0';
    while (at < length && (taken = request(fd, text + at)) > 0)
        at += taken;
    free(client[fd].request);
    client[fd].request = NULL;
    client[fd].length = length - at;
    if (length - at) { /* an unfinished request; an idle stream keeps nothing */
        client[fd].request = malloc(length - at);
        if (client[fd].request == NULL)
            exit(1);
        memcpy(client[fd].request, text + at, length - at);
    }
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    /* Pages that are not touched cost nothing. */
    client = calloc(MOST, sizeof *client);
    own = calloc(MOST, sizeof *own);
    everybody = calloc(MOST, sizeof *everybody);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET};
    address.sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 8080));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (!client || !own || !everybody || bind(listener, (struct sockaddr *)&address, sizeof address)
        || listen(listener, 4096)) {
        perror("server");
        return 1;
    }
    epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        struct epoll_event events[1024];
        int ready = epoll_wait(epoll, events, 1024, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) {
                receive(fd);
                continue;
            }
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                event.data.fd = fd;
                if (fd >= MOST || epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
                    close(fd);
            }
        }
    }
}
