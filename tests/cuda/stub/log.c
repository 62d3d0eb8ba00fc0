/* The log: what would have run on the device, in order, for Python to read. */
#define _GNU_SOURCE
#include "stub.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *file;
static char *text;
static size_t length;

EXPORT void stub_log_start(void)
{
    pthread_mutex_lock(&lock);
    if (file)
        fclose(file);
    free(text);
    text = NULL;
    file = open_memstream(&text, &length);
    pthread_mutex_unlock(&lock);
}

/* End the log; its text is valid until the next start. */
EXPORT const char *stub_log_stop(void)
{
    pthread_mutex_lock(&lock);
    if (file)
        fclose(file);
    file = NULL;
    pthread_mutex_unlock(&lock);
    return text ? text : "";
}

void note(const char *kind, const char *name, size_t bytes)
{
    pthread_mutex_lock(&lock);
    if (file)
        fprintf(file, "%s %zu %s\n", kind, bytes, name ? name : "?");
    pthread_mutex_unlock(&lock);
}

void *handle(void)
{
    static char cells[4096];
    static unsigned next;
    return &cells[__sync_fetch_and_add(&next, 1) % sizeof cells];
}

int capability(void)
{
    const char *chosen = getenv("STUB_CAPABILITY");
    return chosen ? atoi(chosen) : 90;
}
