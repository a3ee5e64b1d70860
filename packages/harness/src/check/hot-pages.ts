/** Pages that both hammering vCPUs and the host keep going for. */
export const HOT_PAGES = 24;
